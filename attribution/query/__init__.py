"""Query the values of a run by text, sample or validation row."""
