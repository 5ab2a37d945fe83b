"""Parts of the experiments `calibrate_thresholds` and `validate_thresholds`."""
