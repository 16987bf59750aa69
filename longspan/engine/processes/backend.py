"""The types by which a front end starts an engine and talks to it. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from longspan.config import EngineConfig
from longspan.engine.control.scheduler import SchedulerConfig
from longspan.engine.control.transport import Launcher
from longspan.engine.processes.wire import Begin, Command, FromEngine, Prepare

Send = Callable[[FromEngine], None]


class Engine(Launcher, Protocol):
    """A launcher of steps that can be freed."""

    def prepare(self, constraint: str) -> None:
        """Compile a constraint ahead of its request; any thread may. Raises `LongspanError`."""

    def close(self) -> None:
        """Free weights and caches."""


@runtime_checkable
class Watched(Protocol):
    """An engine that may end while it has nothing to do, for other processes compute with it."""

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:
        """Call ``on_lost`` once, on some thread, when the engine has come to an end."""


Loader = Callable[[EngineConfig, Send], tuple[SchedulerConfig, Engine]]
"""Sends `Described`, then reads the weights and returns the engine."""


class Backend(Protocol):
    """A started engine, as the front end sees it. Its messages go to the `Send` that it was started
    with."""

    def send(self, message: Begin | Command | Prepare) -> None:
        """Hand a command over; returns at once. Only one thread may call it."""

    def stop(self) -> None:
        """Ask for the end; returns at once. Any thread may call it, any number of times."""

    def join(self, timeout_s: float) -> None:
        """Wait for the end after `stop`. Processes that do not end in time are killed; a thread is
        left alone."""


Start = Callable[[EngineConfig, Send], Backend]
"""Starts an engine, and returns before it is loaded."""
