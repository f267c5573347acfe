"""Measurements: `pytest bench --benchmark-only`, and `python -m bench.gpu_suite` on a GPU, whose
results `python -m bench.report` renders."""
