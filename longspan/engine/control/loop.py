"""One loop, four verbs: receive, schedule, run, process. No torch.

The loop knows a runner only as a `Transport`: batches go in, results come out in the same order.
In one process the transport launches them (`LocalTransport`): one at a time on a CPU, a step behind
another on a GPU. A server's (`longspan.engine.processes.sockets.RunnerTransport`) hands them to
another process: the next step is sent before the last one's tokens are back. No other difference.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from longspan.engine.control.scheduler import InFlightStep, Scheduler
from longspan.engine.control.transport import Transport
from longspan.engine.request import Request
from longspan.engine.step import ScheduledBatch, StepReport, StepResult, Update

MAX_SHORT_STEPS = 8
"""Most steps in flight, however short: after a stop token they are computed for nothing."""
LAUNCH_S = 0.3
"""A sparse prefill chunk of a large model takes the host up to so long to launch (an H200's)."""
PREFILL_AHEAD_S, MOST_AHEAD_S, AHEAD_SHARE = 5e-3, 15e-3, 1 / 3
"""The next step is queued a third of the predicted time of one that prefills before its end, within
these bounds: to schedule and launch one takes some 5 ms, and predictions are off by as much."""


class Loop:
    """Drives a scheduler and a transport. Commands wait in a mailbox until the next turn.

    Args:
        queues_prefill: submit further steps while one that prefills is in flight. That keeps a
            pipeline full; without a pipeline it only makes a request that arrives meanwhile wait
            for two long steps instead of one. If false, the next step is submitted
            `PREFILL_AHEAD_S` or more before the predicted end of the one in flight.
        launch_s: with ``queues_prefill``, steps are also submitted while those that wait behind the
            ones that the device computes are predicted to take less than this: launching one more
            would take longer, and the device have nothing to do. No effect where
            ``max_in_flight`` is 1.
        ahead_s: decode-only steps are submitted until those in flight are predicted to take this
            long together, up to `MAX_SHORT_STEPS`. A device whose steps are shorter than the way
            there and back would otherwise wait. No effect where ``max_in_flight`` is 1.
        on_submit: called with each step before it is handed over.
        on_wait: called before each wait for a result.
        on_result: called with each result before it is applied, and with its step.
    """

    def __init__(
        self, scheduler: Scheduler, transport: Transport, *, queues_prefill: bool = True,
        launch_s: float = LAUNCH_S, ahead_s: float = 0.0,
        on_submit: Callable[[ScheduledBatch], None] | None = None,
        on_wait: Callable[[], None] | None = None,
        on_result: Callable[[InFlightStep, StepResult], None] | None = None,
    ) -> None:
        self._scheduler, self._transport = scheduler, transport
        self._queues_prefill, self._launch_s, self._ahead_s = queues_prefill, launch_s, ahead_s
        self._on_submit, self._on_wait, self._on_result = on_submit, on_wait, on_result
        self._mailbox: deque[Request | str] = deque()
        self._in_flight = scheduler.in_flight
        self._freed_s = 0.0
        """When the latest result came, which is when the step behind it began."""

    @property
    def is_idle(self) -> bool:
        """Nothing to do until the next `add`."""
        return not self._mailbox and self._scheduler.is_idle

    def add(self, request: Request) -> None:
        """Queue a request that fits (see `longspan.engine.request.check_fits`)."""
        self._mailbox.append(request)

    def abort(self, request_id: str) -> None:
        """Cancel a request, whatever its state; takes effect before the next step."""
        self._mailbox.append(request_id)

    def turn(self) -> StepReport:
        """Receive, schedule, run, process. Waits for at most one result."""
        self._receive()
        self._schedule_and_run()
        return self._process()

    def interrupt(self) -> tuple[Update, ...]:
        """Abort the steps in flight after an exception in `turn`, and keep the engine usable."""
        self._transport.discard()
        self._scheduler.drop_in_flight()
        return tuple(self._scheduler.take_updates())

    def _receive(self) -> None:
        while self._mailbox:
            command = self._mailbox.popleft()
            if isinstance(command, str):
                self._scheduler.abort(command)
            else:
                self._scheduler.add(command)

    def _schedule_and_run(self) -> None:
        while self._may_submit():
            batch = self._scheduler.schedule(self._prefill_rest_s)
            if batch is None:
                return
            self._in_flight[-1].submitted_s = time.monotonic()
            if self._on_submit is not None:
                self._on_submit(batch)
            self._transport.submit(batch)
            self._in_flight[-1].launched_s = time.monotonic()

    def _may_submit(self) -> bool:
        if self._prefill_rest_s and not self._queues_prefill:
            return False
        most = self._transport.max_in_flight
        return len(self._in_flight) < most or (most > 1 and (
            self._launch_is_longer if self._prefills_in_flight else self._are_short))

    @property
    def _prefills_in_flight(self) -> bool:
        return any(step.prefills for step in self._in_flight)

    @property
    def _prefill_rest_s(self) -> float:
        """Predicted time until the steps in flight are computed, if any prefills; 0 when it is so
        short that the next step should be on its way."""
        if not self._prefills_in_flight:
            return 0.0
        # A launch that takes the host as long as the device leaves the device nothing to do by its
        # end. Were the next one made right behind it, this step's tokens would wait for that.
        begun_s = max(self._freed_s, self._in_flight[0].launched_s)
        rest_s = begun_s + self._expected_s - time.monotonic()
        return rest_s if rest_s > self._lead_s else 0.0

    @property
    def _expected_s(self) -> float:
        """Predicted time of the steps in flight."""
        return sum(step.batch.expected_s for step in self._in_flight)

    @property
    def _lead_s(self) -> float:
        """How long before the predicted end of the steps in flight the next one is queued."""
        return min(MOST_AHEAD_S, max(PREFILL_AHEAD_S, AHEAD_SHARE * self._expected_s))

    @property
    def _patience_s(self) -> float | None:
        """Longest wait for a result, until the next step must be submitted; None: no limit."""
        if len(self._in_flight) >= self._transport.max_in_flight:
            return None
        rest_s = self._prefill_rest_s
        return max(rest_s - self._lead_s, 1e-6) if rest_s else None  # rounded to 0: for ever

    @property
    def _launch_is_longer(self) -> bool:
        """What waits behind the steps that are computed ends before another one is launched."""
        waiting = list(self._in_flight)[self._transport.max_in_flight - 1 :]
        return (len(self._in_flight) < MAX_SHORT_STEPS and self._in_flight[-1].prefills
                and sum(step.batch.expected_s for step in waiting) < self._launch_s)

    @property
    def _are_short(self) -> bool:
        """The steps in flight are few, and end so soon that the runner might run out of work."""
        return (len(self._in_flight) < MAX_SHORT_STEPS
                and self._expected_s < self._ahead_s)

    def _process(self) -> StepReport:
        if not self._in_flight:
            if self._scheduler.num_requests == 0:
                self._scheduler.check()  # idle: the moment to notice a leak
            return StepReport(updates=tuple(self._scheduler.take_updates()))
        if self._on_wait is not None:
            self._on_wait()
        result = self._transport.collect(self._patience_s)
        if result is None or result.epoch != self._scheduler.epoch:
            return StepReport(updates=tuple(self._scheduler.take_updates()))
        step = self._in_flight[0]
        if self._on_result is not None:
            self._on_result(step, result)
        updates = self._scheduler.apply(result)
        self._freed_s = time.monotonic()
        return StepReport(
            updates=tuple(updates), submitted_s=step.submitted_s,
            finished_s=self._freed_s, kept_pairs=result.kept_pairs,
            causal_pairs=result.causal_pairs, prompt_logprobs=result.prompt_logprobs,
            recalls=result.recalls)
