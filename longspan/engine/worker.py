"""The whole engine on one thread of the caller's process: for tests, whose doubles cannot travel,
and for programs that want no processes. No torch at import.

`inbox` is its only entrance, ``send`` its only exit; the messages are those that travel between
processes (`longspan.engine.launch`), only not encoded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from longspan.config import EngineConfig
from longspan.engine.conductor import Conductor, Send
from longspan.engine.loop import Executor, LocalTransport
from longspan.engine.rehearsal import rehearsal
from longspan.engine.scheduler import Scheduler, SchedulerConfig
from longspan.engine.step import ScheduledBatch, StepResult
from longspan.engine.wire import (
    Begin,
    Close,
    Command,
    Died,
    Loaded,
    Planned,
    Row,
    Stepped,
    last_words,
)


class Engine(Executor, Protocol):
    """What computes, and can be freed."""

    def close(self) -> None:
        """Free weights and caches."""


Loader = Callable[[EngineConfig, Send], tuple[SchedulerConfig, Engine]]
"""Sends `Planned`, then reads the weights."""


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


def load_engine(config: EngineConfig, send: Send) -> tuple[SchedulerConfig, Engine]:
    """The real thing. Raises `LongspanError` when the model cannot be loaded."""
    from longspan.engine.blueprint import Blueprint  # torch: seconds, and not on this file's import

    blueprint = Blueprint.resolve(config)
    scheduler, memory = blueprint.scheduler_config(), blueprint.memory
    send(Planned(
        path=blueprint.path, intake=blueprint.intake(), scheduler=scheduler,
        memory_bytes={"weights": memory.weights_bytes, "workspace": memory.workspace_bytes,
                      "KV cache": memory.kv_bytes}))
    runner = blueprint.load_runner()
    runner.record_graphs()
    if blueprint.config.device != "cpu":  # whose operations need no compiler
        runner.rehearse(rehearsal(scheduler))
    return scheduler, runner


def on_a_thread(load: Loader = load_engine) -> Start:
    """Engines on threads of this process."""
    return lambda config, send: Worker(config, load, send)


class Worker:
    """One engine on its thread, from loading to its end: the last message says why it ended."""

    def __init__(self, config: EngineConfig, load: Loader, send: Send) -> None:
        self._inbox: SimpleQueue[Begin | Command] = SimpleQueue()
        self._config, self._load, self._send = config, load, send
        # A daemon, so that a program that does not stop it ends too.
        self._thread = threading.Thread(target=self._run, name="longspan-engine", daemon=True)
        self._thread.start()

    def send(self, message: Begin | Command) -> None:
        """Hand a command over."""
        self._inbox.put(message)

    def stop(self) -> None:
        """End after the step that is being computed."""
        self._inbox.put(Close())

    def join(self, timeout_s: float) -> None:
        """Wait."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            scheduler, engine = self._load(self._config, self._send)
            try:
                self._send(Loaded())
                Conductor(Scheduler(scheduler), _TellingTransport(engine, self._send), self._take,
                          self._send).run()
            finally:
                engine.close()
            self._send(Died("it was shut down"))
        except BaseException as error:
            self._send(last_words(error))

    def _take(self, must_wait: bool) -> Command | None:
        while True:
            try:
                message = self._inbox.get(block=must_wait)
            except Empty:
                return None
            if not isinstance(message, Begin):  # it knows
                return message


class _TellingTransport(LocalTransport):
    """Tells the front end what each step brought, as a runner process does."""

    def __init__(self, engine: Engine, send: Send) -> None:
        super().__init__(engine)
        self._send = send
        self._rows: tuple[Row, ...] = ()

    def submit(self, batch: ScheduledBatch) -> None:
        super().submit(batch)
        self._rows = tuple(map(Row.of, batch.slices))

    def collect(self, timeout_s: float | None = None) -> StepResult:
        started_s = time.monotonic()
        result = super().collect(timeout_s)
        self._send(Stepped(rows=self._rows, result=result, started_s=started_s,
                           finished_s=time.monotonic()))
        return result


