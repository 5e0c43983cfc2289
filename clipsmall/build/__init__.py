"""Builders of a run's objects; each takes its own config section and plain values."""
