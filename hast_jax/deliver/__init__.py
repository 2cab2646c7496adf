"""What a run gives to a person: exported files, reports, tables, progress bars and pictures."""
