"""Metrics over choice probabilities and generated texts, and the resampling statistics that put error bars on them."""
