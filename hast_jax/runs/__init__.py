"""What lets a run survive: its folder, checkpoints, records, devices and processes. Nothing here depends on the method."""
