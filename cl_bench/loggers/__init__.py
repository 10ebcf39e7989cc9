"""Where a run's events go."""
