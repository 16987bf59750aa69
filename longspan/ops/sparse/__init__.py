"""Vertical-slash prefill attention, one file a backend."""
