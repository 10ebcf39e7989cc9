"""Pure functions of an accuracy :class:`~cl_bench.core.record.Matrix`; nan if a metric is not defined."""
