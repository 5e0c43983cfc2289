"""Dual encoders as files for other libraries: weights, configs, tokenizers and a model card."""

from clipsmall.export.conversion import to_open_clip, to_transformers
from clipsmall.export.weights import Inexpressible

__all__ = ["Inexpressible", "to_open_clip", "to_transformers"]
