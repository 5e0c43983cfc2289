"""Shared by all HTML pages: frame, tables, retrieval queries, pictures and plots."""
