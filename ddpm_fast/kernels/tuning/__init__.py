"""Launch numbers by chip, offline compilation, and what the compiled kernels need."""
