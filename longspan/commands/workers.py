"""Work on several processes, in order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from longspan.errors import LongspanError

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_workers(
    make: Callable[[Item], Made], items: Sequence[Item], num_workers: int
) -> Iterator[Made]:
    """Yield what is made of each item, in order; in this process where one is enough.

    Raises `LongspanError` when a process is ended from outside.
    """
    if num_workers <= 1 or len(items) <= 1:
        yield from map(make, items)
        return
    # Workers leave interrupts to this process: one that dies of them would be waited for forever.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), signal.signal,
                             (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from pool.map(make, items)
        except BrokenProcessPool:
            raise LongspanError("a process that makes rows was ended from outside, for want of "
                                "memory perhaps: repeat the command with fewer --workers") from None


def default_workers() -> int:
    """Count the processes that compose rows unless another number is asked for."""
    return max(1, (os.cpu_count() or 2) - 1)
