"""Learning rules, one a file."""
