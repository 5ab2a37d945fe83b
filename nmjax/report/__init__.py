"""What an experiment leaves behind: result files, plots, one self-contained page."""
