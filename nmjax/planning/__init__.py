"""What a program would need and how long it would take on hardware that is not here: compiled for it, never run."""
