"""GroupNorm, scale and shift, SiLU and dropout in one pass."""
