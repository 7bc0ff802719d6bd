"""The scores of a run on disk, and what is written beside them."""
