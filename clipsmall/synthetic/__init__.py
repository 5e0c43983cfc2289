"""Mining studied on embeddings without a network, as in Cho et al. (arXiv 2307.05906)."""
