"""The parts of `experiments.confidence`."""
