"""Measurements: `pytest bench --benchmark-only`, and `python -m bench.gpu_suite` on a GPU."""
