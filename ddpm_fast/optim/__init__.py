"""What trains a net: the optimizer, its fused step, averages of the weights."""
