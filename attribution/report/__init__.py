"""Write a run's values as one HTML page."""
