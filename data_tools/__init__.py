"""Command-line tools that make, check and index WebDataset shards."""
