"""Benchmarks of several GPUs: measured where there are some, simulated for any number."""
