"""The parts of `experiments.calibration_under_influence`."""
