"""What an engine is to those who start it: a loader, a backend, messages. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from longspan.config import EngineConfig
from longspan.engine.control.loop import Launcher
from longspan.engine.control.scheduler import SchedulerConfig
from longspan.engine.processes.wire import Begin, Command, FromEngine

Send = Callable[[FromEngine], None]


class Engine(Launcher, Protocol):
    """What computes, and can be freed."""

    def close(self) -> None:
        """Free weights and caches."""


Loader = Callable[[EngineConfig, Send], tuple[SchedulerConfig, Engine]]
"""Sends `Described`, then reads the weights."""


class Backend(Protocol):
    """An engine that was started, as the front end sees it; its messages go to the front end's
    ``post``."""

    def send(self, message: Begin | Command) -> None:
        """Hand a command over; returns at once. One thread only."""

    def stop(self) -> None:
        """Ask for the end; returns at once. Any thread, any number of times."""

    def join(self, timeout_s: float) -> None:
        """Wait for the end after `stop`, at most so long where waiting is all that can be done."""


Start = Callable[[EngineConfig, Send], Backend]
"""Starts an engine, and returns before it is loaded."""
