"""Make a data folder without the samples or documents of low value."""
