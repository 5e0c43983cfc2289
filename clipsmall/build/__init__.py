"""Build the objects of a run from the sections of its config."""
