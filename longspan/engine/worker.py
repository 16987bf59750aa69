"""The engine's side of the wire: receives commands, turns the loop, reports. No torch at import.

Runs on a thread of its own, which alone touches scheduler, loop and runner. `inbox` is its only
entrance, ``send`` its only exit; a process would have sockets there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from longspan.config import EngineConfig
from longspan.engine.loop import Executor, LocalTransport, Loop
from longspan.engine.scheduler import Scheduler, SchedulerConfig
from longspan.engine.step import ScheduledBatch
from longspan.engine.wire import (
    Abort,
    Add,
    Died,
    FromEngine,
    Loaded,
    Planned,
    Stepped,
    Submitted,
    ToEngine,
)
from longspan.errors import LongspanError

logger = logging.getLogger("longspan.engine")


class Engine(Executor, Protocol):
    """What computes, and can be freed."""

    def close(self) -> None:
        """Free weights and caches."""


Send = Callable[[FromEngine], None]
Loader = Callable[[EngineConfig, Send], tuple[SchedulerConfig, Engine]]
"""Sends `Planned`, then reads the weights."""


def load_engine(config: EngineConfig, send: Send) -> tuple[SchedulerConfig, Engine]:
    """The real thing. Raises `LongspanError` when the model cannot be loaded."""
    from longspan.engine.blueprint import Blueprint  # torch: seconds, and not on this file's import

    blueprint = Blueprint.resolve(config)
    scheduler, memory = blueprint.scheduler_config(), blueprint.memory
    send(Planned(
        path=blueprint.path, intake=blueprint.intake(),
        capacity_tokens=scheduler.num_blocks * scheduler.block_size,
        prefill_chunk_len=scheduler.prefill_chunk_len,
        memory_bytes={"weights": memory.weights_bytes, "workspace": memory.workspace_bytes,
                      "KV cache": memory.kv_bytes}))
    return scheduler, blueprint.load_runner()


class Worker:
    """One engine, from loading to its end."""

    def __init__(self, config: EngineConfig, load: Loader, send: Send) -> None:
        self.inbox: SimpleQueue[ToEngine] = SimpleQueue()
        self._config, self._load, self._send = config, load, send

    def run(self) -> None:
        """Load, serve until `Close`. Never raises: the last message says why it ended."""
        try:
            scheduler, engine = self._load(self._config, self._send)
            try:
                self._serve(Scheduler(scheduler), engine)
            finally:
                engine.close()
            self._send(Died("it was shut down"))
        except LongspanError as error:
            self._send(Died(" ".join(str(error).split())))
        except BaseException as error:
            logger.exception("the engine failed")
            first_line = (str(error).strip() or "no message").splitlines()[0]
            self._send(Died(f"{type(error).__name__}: {first_line}"))

    def _serve(self, scheduler: Scheduler, engine: Engine) -> None:
        loop = Loop(scheduler, _ReportingTransport(engine, scheduler, self._send))
        self._send(Loaded())
        while self._receive(loop):
            self._send(Stepped(report=loop.turn(), load=scheduler.load))

    def _receive(self, loop: Loop) -> bool:
        """Take all commands that wait, or wait for one if there is nothing to compute. False: end.
        """
        must_wait = loop.is_idle
        while True:
            try:
                message = self.inbox.get(block=must_wait)
            except Empty:
                return True
            must_wait = False
            if isinstance(message, Add):
                loop.add(message.request)
            elif isinstance(message, Abort):
                loop.abort(message.request_id)
            else:
                return False


class _ReportingTransport(LocalTransport):
    """Tells when a step with prefills begins: it may take seconds, and its callers can learn
    already now what the prefix cache supplied."""

    def __init__(self, engine: Engine, scheduler: Scheduler, send: Send) -> None:
        super().__init__(engine)
        self._scheduler, self._send = scheduler, send

    def submit(self, batch: ScheduledBatch) -> None:
        super().submit(batch)
        prefills = tuple((item.request_id, item.cached_len) for item in batch.slices
                         if item.cached_len < item.prompt_len)
        if prefills:
            self._send(Submitted(prefills=prefills, load=self._scheduler.load))
