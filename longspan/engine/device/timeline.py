"""When a rank computed which step, on a clock that the ranks of one machine share."""

from __future__ import annotations

import time

import torch

from longspan.engine.device.launched_step import Stopwatch

Spans = tuple[tuple[float, float], ...]
"""Begin and end of each step, seconds of `time.perf_counter`."""


class Timeline:
    """Notes steps from its making on; made while the device is idle."""

    def __init__(self, device: str) -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        self._base, self._base_s = Stopwatch(device), time.perf_counter()
        self._watches = list[Stopwatch]()

    def note(self, watch: Stopwatch) -> None:
        """Note a step that this stopwatch times."""
        self._watches.append(watch)

    def read(self) -> Spans:
        """Return the steps' times; waits for the last of them."""
        return tuple(watch.span(self._base, self._base_s) for watch in self._watches)
