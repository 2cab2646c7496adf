"""Real images, for evaluation."""
