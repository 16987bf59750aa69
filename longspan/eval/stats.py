"""Intervals of measured shares."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054


def wilson_interval(num_right: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval for a share, 95 % by default; (0, 1) without trials."""
    if n == 0:
        return 0.0, 1.0
    share = num_right / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
