"""The benchmark suite: ``python -m benchmarks --help``, from the repository."""
