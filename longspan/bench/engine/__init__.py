"""The engine as it serves: prefill, decode, quality."""
