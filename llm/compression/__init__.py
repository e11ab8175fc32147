"""Smaller models: weights packed in fewer bits."""
