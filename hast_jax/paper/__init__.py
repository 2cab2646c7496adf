"""The experiments of the paper's supplement, its tables and figures, and those of the recipe `best`."""
