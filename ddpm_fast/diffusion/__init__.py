"""The diffusion process: schedule tables, predictions, losses, samplers over any f(x, t, y)."""
