"""Checking shards: each one whole and indexed, a report on all, a sheet of pictures."""
