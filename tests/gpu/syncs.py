"""A stretch of code in which nothing may wait for the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_syncs() -> Iterator[None]:
    """Operations that wait for the GPU raise; what it does still is waited for before."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # PyTorch warns, once, that the mode does not find everything; warnings are errors here
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
