"""Parts of `experiments.plan`."""
