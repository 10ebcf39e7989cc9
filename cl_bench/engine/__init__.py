"""Training, measuring, resuming."""
