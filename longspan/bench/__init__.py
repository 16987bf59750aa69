"""Measurements, the files they are kept in, and the tables made from those. Above all layers."""
