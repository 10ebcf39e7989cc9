"""The parts of scripts/benchmark.py; each yields rows of its table."""
