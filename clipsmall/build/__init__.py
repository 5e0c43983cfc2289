"""Builds the objects of a run; a builder takes its section of the config and plain values."""
