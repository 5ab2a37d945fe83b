"""Steering vectors: extraction from contrasting texts, validation, files, and where a model's vectors are kept."""
