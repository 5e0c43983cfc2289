"""A run's report as one HTML page: curves, tables and a gallery of retrievals."""
