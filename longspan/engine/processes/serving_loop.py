"""The scheduler's life: takes commands, turns the loop, tells the front end what it decided.
No torch.

The same for an engine on a thread and for one in processes; only where commands come from, and
which transport leads to the runner, differ.
"""

from __future__ import annotations

from collections.abc import Callable

from longspan.engine.control.loop import Loop, Transport
from longspan.engine.control.scheduler import Load, Scheduler
from longspan.engine.control.self_measurement import warm_up
from longspan.engine.processes.backend import Send
from longspan.engine.processes.wire import Add, Close, Command, LoadChanged, Submitted
from longspan.engine.step import ScheduledBatch, StepResult

AHEAD_S = 5e-3
"""Decode work that is queued ahead: several round trips between processes, yet negligible for a
request that arrives meanwhile."""
TakeCommand = Callable[[bool], Command | None]
"""The next command; waits for one if the argument says so, else None where there is none."""


class Conductor:
    """Runs one scheduler until `Close`."""

    def __init__(
        self, scheduler: Scheduler, transport: Transport, take: TakeCommand, send: Send,
    ) -> None:
        self._scheduler = scheduler
        self._news = _News(scheduler, transport, send)
        self._loop = Loop(scheduler, self._news, queues_prefill=False, ahead_s=AHEAD_S)
        self._take = take

    def run(self) -> None:
        """Serve. What the runner or the scheduler raises comes out here."""
        self._news.tell_load()
        warm_up(self._scheduler, self._loop)
        self._news.tell_load()
        while self._receive():
            self._loop.turn()
            if self._loop.is_idle:
                self._news.tell_load()

    def _receive(self) -> bool:
        """Take all commands that wait, or wait for one if there is nothing to compute. False: end.
        """
        must_wait = self._loop.is_idle
        while (command := self._take(must_wait)) is not None:
            must_wait = False
            if isinstance(command, Add):
                self._loop.add(command.request)
            elif isinstance(command, Close):
                return False
            else:
                self._loop.abort(command.request_id)
        return True


class _News:
    """A transport that tells when a step with prefills begins: it may take seconds, and its callers
    can learn already now what the prefix cache supplied."""

    def __init__(self, scheduler: Scheduler, transport: Transport, send: Send) -> None:
        self._scheduler, self._transport, self._send = scheduler, transport, send
        self._load: Load | None = None

    @property
    def max_in_flight(self) -> int:
        """That of the transport."""
        return self._transport.max_in_flight

    def submit(self, batch: ScheduledBatch) -> None:
        """Hand over, and tell."""
        self._transport.submit(batch)
        prefills = tuple((item.request_id, item.cached_len) for item in batch.slices
                         if item.cached_len < item.prompt_len)
        if prefills:
            self.tell_load()
            self._send(Submitted(prefills))

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """The oldest result. The load is told before the wait for it, so that the status is current
        during a step of seconds."""
        self.tell_load()
        return self._transport.collect(timeout_s)

    def discard(self) -> None:
        """Drop what is in flight."""
        self._transport.discard()

    def tell_load(self) -> None:
        """Unless the front end knows it."""
        load = self._scheduler.load
        if load != self._load:
            self._load = load
            self._send(LoadChanged(load))
