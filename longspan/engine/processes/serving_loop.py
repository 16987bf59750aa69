"""The scheduler's life: it takes commands, turns the loop, and tells the front end what it decided.
No torch.

An engine on a thread and one in processes differ only in where commands come from, and in the
transport that leads to the runner.
"""

from __future__ import annotations

from collections.abc import Callable

from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import InFlightStep, Load, Scheduler
from longspan.engine.control.self_measurement import measure_itself
from longspan.engine.control.transport import Transport
from longspan.engine.processes.backend import Send
from longspan.engine.processes.wire import Add, Close, Command, LoadChanged, Submitted
from longspan.engine.step import ScheduledBatch, StepResult

AHEAD_S = 5e-3
"""Decode work that is queued ahead: several round trips between processes, yet negligible for a
request that arrives meanwhile."""
TakeCommand = Callable[[bool], Command | None]
"""Returns the next command. Waits for one if the argument says so; None where there is none."""
OnResult = Callable[[InFlightStep, StepResult], None]


class ServingLoop:
    """Runs one scheduler until `Close`.

    Args:
        on_result: called with each result; None where the runner tells the front end itself.
    """

    def __init__(
        self, scheduler: Scheduler, transport: Transport, take: TakeCommand, send: Send,
        on_result: OnResult | None = None,
    ) -> None:
        self._scheduler, self._take, self._send = scheduler, take, send
        # The load is told before each wait, so that the status is current in a step of seconds.
        self._loop = Loop(
            scheduler, transport, queues_prefill=scheduler.config.num_stages > 1, launch_s=0.0,
            ahead_s=AHEAD_S, on_submit=self._tell_prefills, on_wait=self._tell_load,
            on_result=on_result)
        self._load: Load | None = None
        self._is_measuring = False

    def run(self) -> None:
        """Serve. Errors of the runner and of the scheduler are raised here."""
        self._tell_load()
        self._is_measuring = True
        measure_itself(self._scheduler, self._loop)
        self._is_measuring = False
        self._tell_load()
        while self._receive():
            self._loop.turn()
            if self._loop.is_idle:
                self._tell_load()

    def _receive(self) -> bool:
        """Take all commands that wait, or wait for one if nothing is to compute. False: `Close`."""
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

    def _tell_prefills(self, batch: ScheduledBatch) -> None:
        """Tell what the prefix cache supplied, before a step that may take seconds."""
        if batch.prefills and not self._is_measuring:
            self._tell_load()
            self._send(Submitted(tuple(
                (item.request_id, item.cached_len) for item in batch.slices
                if item.cached_len < item.prompt_len)))

    def _tell_load(self) -> None:
        """Tell the load, unless the front end knows it; its own measurements are nobody's."""
        if self._is_measuring:
            return
        load = self._scheduler.load
        if load != self._load:
            self._load = load
            self._send(LoadChanged(load))
