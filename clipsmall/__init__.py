"""Small-batch CLIP: dual-encoder training with exact global losses on small hardware."""

__version__ = "0.1.0"
