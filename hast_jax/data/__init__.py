"""Real images, from data sets and from files."""
