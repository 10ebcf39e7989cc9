"""Data sets cut into tasks."""
