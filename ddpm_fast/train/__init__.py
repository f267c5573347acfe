"""The trainer: config.py (what a run is), step.py (one step), loop.py (the run around it)."""
