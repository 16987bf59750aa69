"""Runs of benchmarks, and the tables and plots made of their rows."""
