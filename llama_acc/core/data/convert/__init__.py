"""Data of other formats into the project's own: `formats` has a function per format, `run` streams rows through it."""
