"""All that only an accelerator can tell, in one command; see :mod:`benchmarks.gpu.__main__`."""
