"""Making shards: tables and stores of images, merged into pairs, written as tars."""
