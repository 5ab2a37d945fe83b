"""Metrics over choice probabilities and the resampling statistics that put error bars on them."""
