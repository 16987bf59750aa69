"""Rank 0's runner: each step goes to the other ranks too, and is computed on a thread of its own,
so that whoever waits for it hears of a lost rank."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import torch.distributed as dist
from msgspec.structs import replace

from longspan.attention.observer import AttentionObserver
from longspan.engine.control.transport import LocalTransport, Transport
from longspan.engine.device.launched_step import LaunchedStep
from longspan.engine.device.prompt_logprobs import OnLogits
from longspan.engine.device.runner import Runner
from longspan.engine.device.stage_runner import StagedStep, StageRunner, merge
from longspan.engine.device.timeline import Spans
from longspan.engine.processes.block_tables import BlockTableCache
from longspan.engine.ranks.hub import Hub
from longspan.engine.ranks.messages import (
    CompileAhead,
    Compute,
    Finish,
    RecordGraphs,
    Trace,
)
from longspan.engine.step import ScheduledBatch, StepResult
from longspan.errors import LongspanError, RankLostError
from longspan.ops.types import PagedKV

POLL_S = 0.1
LOST_S = 2.0
"""A collective may fail before the loss that it fails by is known."""
LEAVE_S = 10.0
"""A lost rank's collective ends with an error, but not at once, least of all on busy cores."""
Result = TypeVar("Result")


class RankThread:
    """The one thread that computes; libraries keep settings by thread."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        # A daemon: it may wait for a rank that never answers.
        threading.Thread(target=self._run, name="longspan-compute", daemon=True).start()

    def begin(self, task: Callable[[], Result]) -> Future[Result]:
        """Run a task behind those before it."""
        future: Future[Result] = Future()
        self._tasks.put((task, future))
        return future

    def do(self, task: Callable[[], Result]) -> Result:
        """Run a task and wait for it. Raises `RankLostError` when a rank is lost meanwhile."""
        return self.wait(self.begin(task))

    def wait(self, future: Future[Result], timeout_s: float | None = None) -> Result:
        """Wait for a task. Raises `TimeoutError`, and as `do`."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._hub.check()
            rest_s = POLL_S if end_s is None else max(0.0, min(POLL_S, end_s - time.monotonic()))
            try:
                return future.result(rest_s)
            except TimeoutError:
                if future.done() or (end_s is not None and time.monotonic() >= end_s):
                    raise
            except RankLostError:
                raise
            except Exception:
                self._await_loss()
                raise

    def _await_loss(self) -> None:
        end_s = time.monotonic() + LOST_S
        while time.monotonic() < end_s:
            self._hub.check()
            time.sleep(POLL_S)

    def _run(self) -> None:
        while True:
            task, future = self._tasks.get()
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)


class RankedStep:
    """A step that all ranks compute; see `longspan.engine.control.transport.PendingStep`."""

    def __init__(
        self, hub: Hub, thread: RankThread, launched: Future[LaunchedStep | StagedStep],
    ) -> None:
        self._hub, self._thread, self._launched = hub, thread, launched

    def wait_for(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s``; True if the device has finished the step."""
        end_s = time.monotonic() + timeout_s
        try:
            step = self._thread.wait(self._launched, timeout_s)
        except TimeoutError:
            return False
        return step.wait_for(max(0.0, end_s - time.monotonic()))

    def wait(self) -> StepResult:
        """Wait for the result. Raises `RankLostError` when there will be none."""
        step = self._thread.wait(self._launched)
        while not step.wait_for(POLL_S):
            self._hub.check()
        if isinstance(step, LaunchedStep):
            return step.wait()
        staged = step
        self._thread.do(lambda: self._finish(staged))
        result = staged.wait()
        return merge([result, *self._hub.results(result.step_id)])


    def _finish(self, step: StagedStep) -> None:
        self._hub.send(Finish(step.batch.step_id))
        step.runner.finish_until(step)


class LeadRunner:
    """Drives the runner of this process and those of the other ranks. As a `Runner`."""

    def __init__(self, runner: Runner | StageRunner, hub: Hub, thread: RankThread) -> None:
        self._runner, self._hub, self._thread = runner, hub, thread
        self._tables = BlockTableCache()

    @property
    def caches(self) -> list[PagedKV]:
        """Keys and values of all layers on this rank."""
        return self._runner.caches

    def transport(self) -> Transport:
        """For a loop in this process."""
        return LocalTransport(self, self._runner.transport().max_in_flight)

    def launch(self, batch: ScheduledBatch) -> RankedStep:
        """Have all ranks compute a step. Raises `RankLostError` when one is lost."""
        self._hub.check()
        step = self._tables.strip(batch)
        return RankedStep(self._hub, self._thread, self._thread.begin(
            lambda: self._send_and_launch(Compute(step), batch)))

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute a step and wait for its result."""
        return self.launch(batch).wait()

    def record_graphs(self) -> None:
        """Record all decode graphs on all ranks."""
        self._hub.send(RecordGraphs())
        self._thread.do(self._runner.record_graphs)

    def compile_ahead(self, steps: Iterable[ScheduledBatch]) -> None:
        """Compute steps on all ranks for what they compile."""
        every = tuple(replace(step, slices=tuple(
            replace(item, block_ids=tuple(item.block_ids)) for item in step.slices))
            for step in steps)
        self._hub.send(CompileAhead(every))
        self._thread.do(lambda: self._runner.compile_ahead(every))

    def trace(self) -> None:
        """Have all ranks note from now on when they compute each step."""
        self._hub.send(Trace(True))
        self._thread.do(self._runner.trace)

    def traced_ranks(self) -> list[Spans]:
        """Return when each rank computed its steps since `trace`, rank 0 first. With every step
        waited for."""
        return [self._thread.do(self._runner.traced), *self._hub.traced()]

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:
        """Call ``on_lost`` once, on some thread, when a rank is lost, whatever is computed."""
        def tell() -> None:
            # on a thread of its own: NCCL may wait for graphs that hold its collectives
            threading.Thread(target=abort_collectives, daemon=True).start()
            try:
                self._hub.check()
            except RankLostError as error:
                on_lost(error)

        self._hub.on_failure = tell

    def observe(self, observer: AttentionObserver | None) -> None:
        """As `Runner.observe`, for the rows and heads of rank 0."""
        self._runner.observe(observer)

    def select_by(self, selector: Callable[..., Any] | None) -> None:
        """Refuse another selection: the other ranks would not have it."""
        if selector is not None:
            raise LongspanError("another selection needs one rank; leave the others out")

    def watch_logits(self, on_logits: OnLogits | None) -> None:
        """As `Runner.watch_logits`."""
        self._runner.watch_logits(on_logits)

    def prepare(self, constraint: str | None = None) -> None:
        """As `Runner.prepare`, on rank 0; other ranks compile in the step."""
        self._runner.prepare(constraint)

    def peak_memory_bytes(self) -> int:
        """Highest use of rank 0; the others are alike."""
        return self._runner.peak_memory_bytes()

    def close(self) -> None:
        """End all ranks, and free weights and caches."""
        self._hub.close()
        # also after a loss: the next engine of this process needs torch.distributed for itself
        with contextlib.suppress(TimeoutError, RuntimeError):
            self._thread.begin(self._leave).result(LEAVE_S)

    def _leave(self) -> None:
        try:
            self._runner.close()
        finally:
            if _has_nccl():  # it waits for graphs that hold its collectives
                gc.collect()
            abort_collectives()  # and for other ranks, which have ended
            if dist.is_initialized():
                dist.destroy_process_group()

    def _send_and_launch(
        self, message: Compute, batch: ScheduledBatch,
    ) -> LaunchedStep | StagedStep:
        self._hub.send(message)
        return self._runner.launch(batch)


def abort_collectives() -> None:
    """Wake what waits on a GPU for a rank that is lost."""
    if _has_nccl():
        with contextlib.suppress(Exception):
            dist.distributed_c10d._abort_process_group()


def _has_nccl() -> bool:
    return dist.is_initialized() and dist.get_backend() == "nccl"
