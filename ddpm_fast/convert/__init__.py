"""Weights of other implementations: original.py reads the original repository's .pth files."""
