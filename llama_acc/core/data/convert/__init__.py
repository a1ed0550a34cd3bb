"""Data of other formats into the project's own: one file per format, and `run`, which streams rows through them."""
