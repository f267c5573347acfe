"""How good images are: frechet.py, the Frechet distance of features."""
