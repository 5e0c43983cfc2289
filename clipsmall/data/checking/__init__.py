"""Checking shards: completeness and index of each, a report on all, and a contact sheet."""
