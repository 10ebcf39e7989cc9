"""Continual-learning experiments, chosen by configuration."""

__version__ = "0.1.0"
