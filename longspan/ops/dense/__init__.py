"""Dense prefill attention, one file a backend."""
