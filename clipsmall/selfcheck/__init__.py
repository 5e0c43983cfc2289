"""Check on this machine that a config trains with the exact global gradient."""
