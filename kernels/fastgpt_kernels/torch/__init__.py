"""PyTorch's own best op for each of ours, under our semantics, on any device."""
