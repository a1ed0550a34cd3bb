"""Several processes: how they are started, what each knows of the others, and the groups they form."""
