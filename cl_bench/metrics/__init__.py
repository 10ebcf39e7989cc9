"""Pure functions of an accuracy :class:`~cl_bench.record.Matrix`; nan where a metric is not defined."""
