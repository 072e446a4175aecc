"""Models that leave for PyTorch, and models that come from there."""
