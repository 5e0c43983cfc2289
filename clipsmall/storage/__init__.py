"""Files on disk: checkpoints, run folders, and the locks that protect them."""
