"""What lets a run survive: its folder, checkpoints, records, devices and processes. Nothing here computes with the method."""
