"""What is written to disk: checkpoints, run folders and the locks that protect them."""
