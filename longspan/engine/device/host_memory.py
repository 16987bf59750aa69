"""Allocator settings for engines on CPUs."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEEP_BYTES = 2**31 - 1


def keep_buffers_in_heap() -> bool:
    """Let large buffers be reused instead of returned to the system after each use.

    glibc maps every allocation above 32 MiB afresh and hands it back when freed; the page faults
    then cost a fifth of sparse prefill (log.md, 2026-11-23). Returns False where there is no glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))
