"""Cho et al.'s study of batch mining on free embeddings (arXiv 2307.05906)."""
