"""The machine: memory, energy, files, signals, output streams."""
