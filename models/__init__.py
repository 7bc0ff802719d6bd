"""Models: one file for each architecture, and models in Hugging Face format."""
