"""The forward process, fused."""
