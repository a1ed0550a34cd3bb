"""Other programs' own models and steps, run without values to count the memory that they take."""
