"""The stages: synthesis, calibration, fine-tuning, evaluation. Each has a small state, a pure step and a `run`."""
