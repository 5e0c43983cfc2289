"""What all HTML pages share: their frame, tables, retrieval queries, pictures and plots."""
