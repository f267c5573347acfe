"""What the GPUs and the host do while something runs."""
