"""A run's values as one HTML page."""
