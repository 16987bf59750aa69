"""Which columns and windows each head attends to, one file a backend."""
