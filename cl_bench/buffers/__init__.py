"""Rehearsal buffers, one policy a file."""
