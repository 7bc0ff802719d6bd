"""The engine in the training loops of other libraries."""
