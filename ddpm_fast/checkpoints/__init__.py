"""Saved nets: own.py (our format), writer.py, load.py, original.py (the original's .pth files)."""
