"""Benchmarks; each module runs with `python -m bench.<name>` from the root of the repository."""
