"""Plain mathematical functions; the body of each is its PyTorch reference."""
