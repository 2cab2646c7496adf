"""What a person gets of a run: tables, progress bars and pictures."""
