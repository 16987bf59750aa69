"""One layer of a real shape: attention ops beside those of PyTorch."""
