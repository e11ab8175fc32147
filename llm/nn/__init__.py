"""Linen building blocks shared by all model families."""
