"""One run from command to report, and what can be asked of its folder."""
