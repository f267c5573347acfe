"""The network: config.py (data, no torch), blocks.py (parts), unet.py (the whole)."""
