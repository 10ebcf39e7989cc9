"""What everything else speaks of: tasks, batches, phases, records, errors."""
