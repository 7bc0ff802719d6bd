"""A data folder without the samples that a run's values advise against."""
