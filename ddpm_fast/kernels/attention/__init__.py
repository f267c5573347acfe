"""Self-attention over pixels."""
