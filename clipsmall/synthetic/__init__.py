"""Mining studied on free embeddings, as in Cho et al. (arXiv 2307.05906)."""
