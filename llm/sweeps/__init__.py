"""Sweeps: settings that an experiment file names, a run of llm.train each, and the table and picture of them all."""

from llm.sweeps.settings import Range, Setting, grid

__all__ = ["Range", "Setting", "grid"]
