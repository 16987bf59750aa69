"""Allocator settings for engines on CPUs."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_KEEP_BYTES = 2**31 - 1
_OWN_BYTES = 2**20


def give_buffers_back() -> bool:
    """Let buffers of a megabyte and more go back to the system when they are freed, while weights
    are loaded.

    glibc takes the size of what was freed last for the border, up to 32 MiB: weights and what they
    are made from then lie side by side in the heap, whose holes stay (a quarter of a GiB beside a
    0.5B model). Returns False where there is no glibc.
    """
    return _mallopt((_M_MMAP_THRESHOLD, _OWN_BYTES))


def keep_buffers_in_heap() -> bool:
    """Let large buffers be reused instead of returned to the system after each use.

    glibc maps every allocation above 32 MiB afresh and hands it back when freed; the page faults
    then cost a fifth of sparse prefill (log.md, 2026-11-23). Returns False where there is no glibc.
    """
    return _mallopt((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP_BYTES))


def _mallopt(*settings: tuple[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    return all(libc.mallopt(name, value) for name, value in settings)
