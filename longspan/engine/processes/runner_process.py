"""The runner's process: steps in, sampled tokens out to scheduler and front end.

Three threads. One receives steps and launches them; on a GPU that returns before they are computed.
Another waits for the results and sends them. So the next step is launched while the one before
is computed, and no token waits for a launch. The third compiles grammars before the requests come
that follow them: that may take half a second, and running answers must not wait for it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, cast

import zmq
from msgspec.structs import replace

from longspan import garbage
from longspan.engine.control.transport import PendingStep
from longspan.engine.processes.backend import Engine, Loader, Watched
from longspan.engine.processes.block_tables import BlockTableCache
from longspan.engine.processes.child_orders import Orders
from longspan.engine.processes.sockets import Inbox, Outbox
from longspan.engine.processes.wire import (
    Loaded,
    Prepare,
    Prepared,
    Step,
    Stepped,
    computed_slices,
    last_words,
)
from longspan.engine.step import ScheduledBatch
from longspan.errors import LongspanError

logger = logging.getLogger("longspan.engine")

SWITCH_S = 5e-4
"""Longest time that a thread keeps the interpreter from the other one."""


@dataclass(frozen=True, slots=True)
class _Started:
    batch: ScheduledBatch
    pending: PendingStep
    time_s: float


def run(orders: Orders) -> int:
    """Load, then compute until the parent lets go or a step fails. Returns the exit status."""
    sys.setswitchinterval(SWITCH_S)
    incoming: zmq.Context[Any] = zmq.Context()
    results = Results(orders)
    try:
        inbox = Inbox(incoming, orders.address("runner"), Step)
        constraints = Inbox(incoming, orders.address("grammars"), Prepare)
        _, engine = _loader(orders.loader)(orders.config, results.front.put)
        garbage.freeze()
        results.front.put(Loaded())
    except BaseException as error:
        results.end(error)
        return 1
    started: SimpleQueue[_Started | BaseException] = SimpleQueue()
    if isinstance(engine, Watched):
        engine.watch(started.put)
    # From here on only this thread uses the sockets of `results`.
    collector = threading.Thread(target=results.run, args=(started,), name="longspan-collect")
    collector.start()
    front = Outbox(incoming, orders.address("front"))
    threading.Thread(target=_prepare, args=(constraints, engine, front), daemon=True,
                     name="longspan-grammars").start()
    _launch(inbox, engine, started)
    collector.join()
    return 1


def _loader(name: str) -> Loader:
    module, function = name.split(":")
    return cast(Loader, getattr(importlib.import_module(module), function))


def _launch(inbox: Inbox, engine: Engine, started: SimpleQueue[_Started | BaseException]) -> None:
    """Launch steps until one fails, on the thread that loaded the model: libraries keep settings by
    thread."""
    tables = BlockTableCache()
    try:
        while True:
            batch = tables.restore(inbox.get())
            time_s = time.monotonic()
            started.put(_Started(batch, engine.launch(batch), time_s))
    except BaseException as error:
        started.put(error)


def _prepare(constraints: Inbox, engine: Engine, front: Outbox) -> None:
    """Compile what is asked for, one after the other. What fails here fails again for its request,
    which is told why."""
    while True:
        constraint = constraints.get().constraint
        try:
            engine.prepare(constraint)
        except LongspanError:
            pass
        except Exception:
            logger.exception("a constraint could not be compiled")
        front.put(Prepared(constraint))


class Results:
    """The collecting thread, and the messages that leave this process."""

    def __init__(self, orders: Orders) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.scheduler = Outbox(self._context, orders.address("scheduler"))
        self.front = Outbox(self._context, orders.address("front"))

    def run(self, started: SimpleQueue[_Started | BaseException]) -> None:
        """Send the results of started steps, in order, until one fails. Ends the process."""
        try:
            while True:
                item = started.get()
                if isinstance(item, BaseException):
                    raise item
                self._send(item)
        except BaseException as error:
            self.end(error)
            os._exit(1)  # the other thread may be waiting or computing

    def end(self, error: BaseException) -> None:
        """Send last words, and wait until they have left."""
        self.front.put(last_words(error))
        self.front.close()
        self.scheduler.close()
        self._context.term()

    def _send(self, item: _Started) -> None:
        slices = computed_slices(item.batch)  # before the wait, which leaves time for it
        result = item.pending.wait()
        finished_s = time.monotonic()
        # Which tokens were how probable is nothing to schedule by.
        self.scheduler.put(replace(result, prompt_logprobs=()))
        self.front.put(Stepped(slices=slices, result=result, started_s=item.time_s,
                               finished_s=finished_s))
