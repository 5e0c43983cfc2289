"""Dual encoders: towers from several libraries, heads, adapters, chunks."""
