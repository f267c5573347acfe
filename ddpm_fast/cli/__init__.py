"""Command lines: verbs.py (the console script), arguments.py (flags to options), values.py."""
