"""One step of the reverse process, fused."""
