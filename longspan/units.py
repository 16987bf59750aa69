"""Number types by name, and amounts of memory in words. Standard library only."""

from __future__ import annotations

GIB = 1024**3
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
"""Types that an engine computes and caches in, and the bytes of one number."""


def default_dtype(device: str) -> str:
    """Type on a device (``cpu``, ``cuda``, ``cuda:1``), unless another one is asked for."""
    return "float32" if device == "cpu" else "bfloat16"


def in_gib(num_bytes: float) -> str:
    """Format an amount of memory for a person."""
    return f"{num_bytes / GIB:.2f} GiB"
