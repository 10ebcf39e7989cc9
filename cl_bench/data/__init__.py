"""Images in memory, and their augmentation in batches."""
