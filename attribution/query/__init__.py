"""What a text, a sample or a validation row has to do with a run's values."""
