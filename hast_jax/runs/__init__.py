"""What makes a run survive: its folder, checkpoints, records, devices and processes. Nothing here knows the method."""
