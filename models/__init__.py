"""Models: one file for each family, what is common to all of them, and models in Hugging Face format."""
