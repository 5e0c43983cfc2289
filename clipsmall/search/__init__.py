"""Search a data set by text or picture: embeddings made once, exact search, a local page."""

from clipsmall.search.embeddings import StoredEmbeddings, embed
from clipsmall.search.index import INDEXES, Exact
from clipsmall.search.searcher import Answer, Hit, Searcher

__all__ = ["INDEXES", "Answer", "Exact", "Hit", "Searcher", "StoredEmbeddings", "embed"]
