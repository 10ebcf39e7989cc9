"""Pure functions of an accuracy :class:`~cl_bench.core.record.Matrix`; nan where a metric is not defined."""
