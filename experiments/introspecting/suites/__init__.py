"""What the models are asked, one suite a file; see `experiments.introspecting.subjects.Suite`."""
