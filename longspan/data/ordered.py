"""Work on threads whose results come in the order of the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

_AHEAD = 4
"""Items that may be finished before an earlier one is, for each that is being made."""


def in_order(
    work: Callable[[Item], Made], items: Sequence[Item], concurrency: int,
    stop: Callable[[], None],
) -> Iterator[Made]:
    """Yield what is made of each item, in their order; one at a time in this thread, where an
    interrupt reaches it. ``stop`` is called before an error goes up."""
    if concurrency == 1:
        yield from map(work, items)
        return
    running: dict[Future[Made], int] = {}
    finished: dict[int, Made] = {}
    begun = shown = 0
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while shown < len(items):
                while (len(running) < concurrency and begun < len(items)
                       and begun - shown < _AHEAD * concurrency):
                    running[pool.submit(work, items[begun])] = begun
                    begun += 1
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finished[running.pop(future)] = future.result()
                while shown in finished:
                    yield finished.pop(shown)
                    shown += 1
        except BaseException:
            stop()
            pool.shutdown(cancel_futures=True)
            raise
