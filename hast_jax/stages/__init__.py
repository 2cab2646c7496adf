"""The stages: synthesis, calibration, fine-tuning, evaluation. Each has a small state and a pure step."""
