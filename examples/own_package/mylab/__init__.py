"""Components of mylab for cl_bench."""
