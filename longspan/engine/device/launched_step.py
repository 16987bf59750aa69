"""A step that was handed to the device, and its result once it is there."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.recall import RecallSums
from longspan.engine.device.block_mover import BlockMover
from longspan.engine.device.sampling import SampledTokens
from longspan.engine.step import ScheduledBatch, SparseRecall, StepResult

NEWS_S = 0.02
"""A step that computes nothing ends when a copy of blocks does, or after this time."""
POLL_S = 2e-4
"""Seconds between two polls of a device: an event cannot be waited for with a timeout."""


class Stopwatch:
    """Times what one thread hands to a device from its making to `stop`: on GPUs the time that the
    device needs, without waiting for what was handed to it before."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device.startswith("cuda")
        self._start_s = time.perf_counter()
        self._stop_s = 0.0
        if self.is_cuda:
            # Blocking: a waiting thread leaves the core to others.
            self._start = torch.cuda.Event(enable_timing=True)
            self._stop = torch.cuda.Event(enable_timing=True, blocking=True)
            self._start.record()

    @property
    def begun(self) -> torch.cuda.Event | None:
        """Everything that was handed to the device before; None on CPUs."""
        return self._start if self.is_cuda else None

    def stop(self) -> None:
        """Mark the end of the work to time."""
        self._stop_s = time.perf_counter()
        if self.is_cuda:
            self._stop.record()

    def wait_for(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` after `stop`; True if the device is done."""
        end_s = time.monotonic() + timeout_s
        while self.is_cuda and not self._stop.query():
            if time.monotonic() >= end_s:
                return False
            time.sleep(POLL_S)
        return True

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Make later work on ``stream`` wait, after `stop`, for the work that was timed."""
        stream.wait_event(self._stop)

    def wait(self) -> float:
        """Wait until the device is done; returns the device's time in seconds."""
        if not self.is_cuda:
            return self._stop_s - self._start_s
        self._stop.synchronize()
        return 1e-3 * self._start.elapsed_time(self._stop)


    def span(self, base: Stopwatch, base_s: float) -> tuple[float, float]:
        """Return begin and end of what was timed, after a wait.

        Args:
            base: another one of this device, started at ``base_s`` of `time.perf_counter`.
        """
        if not self.is_cuda:
            return self._start_s, self._stop_s
        self._stop.synchronize()
        begin_s = base_s + 1e-3 * base._start.elapsed_time(self._start)
        return begin_s, begin_s + self.wait()


class LaunchedStep:
    """Made right after its work was queued; `wait` may be called on another thread.

    Args:
        sampled: None when no slice samples or scores.
        pairs: attention pairs kept, where they were counted, and causal.
        recalls: of the requests whose sparse chunks the step completed.
        watch: started before the work was queued.
        copies: for the way to the host, beside the next step's work; None on CPUs.
        mover: tells which copies of blocks have ended.
    """

    def __init__(
        self, batch: ScheduledBatch, sampled: SampledTokens | None,
        pairs: tuple[Tensor | float, float], watch: Stopwatch, copies: torch.cuda.Stream | None,
        recalls: Sequence[tuple[str, RecallSums]] = (), mover: BlockMover | None = None,
    ) -> None:
        self._batch, self._pairs, self._watch, self._mover = batch, pairs, watch, mover
        self._sampled, self._recalls = sampled, recalls
        self._copied: torch.cuda.Event | None = None
        watch.stop()
        if copies is not None and (sampled is not None or recalls):
            self._fetch(copies)

    def wait_for(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s``; True if the device has finished the step."""
        return self._watch.wait_for(timeout_s)

    def wait(self) -> StepResult:
        """Wait until the device is done, and return the result."""
        elapsed_s = self._watch.wait()
        if self._copied is not None:
            self._copied.synchronize()
        token_ids, logprobs = ((), ()) if self._sampled is None else self._sampled.as_tuples()
        kept, causal = self._pairs
        wait_s = 0.0 if self._batch.slices else NEWS_S
        return StepResult(
            transfers=() if self._mover is None else self._mover.results(wait_s),
            step_id=self._batch.step_id, epoch=self._batch.epoch, repeats=self._batch.repeats,
            token_ids=token_ids, logprobs=logprobs, kept_pairs=float(kept), causal_pairs=causal,
            failures={} if self._sampled is None else self._sampled.failures,
            prompt_logprobs=() if self._sampled is None else tuple(
                rows.as_message() for rows in self._sampled.scored), elapsed_s=elapsed_s,
            recalls=tuple(_as_message(name, recall) for name, recall in self._recalls))

    def _fetch(self, copies: torch.cuda.Stream) -> None:
        kept, causal = self._pairs
        # their memory is not used again before the copy is done
        self._on_device = self._sampled, kept, self._recalls
        self._watch.hold(copies)
        with torch.cuda.stream(copies):
            if self._sampled is not None:
                self._sampled = self._sampled.cpu(non_blocking=True)  # to pinned memory
            if isinstance(kept, Tensor):
                self._pairs = kept.to("cpu", non_blocking=True), causal
            self._recalls = [
                (name, recall._replace(sums=recall.sums.to("cpu", non_blocking=True)))
                for name, recall in self._recalls]
        self._copied = torch.cuda.Event(blocking=True)
        self._copied.record(copies)


def _as_message(request_id: str, recall: RecallSums) -> SparseRecall:
    typical, scouts = recall.sums.tolist()
    return SparseRecall(
        request_id=request_id, typical=typical, typical_weight=recall.weights[0], scouts=scouts,
        scouts_weight=recall.weights[1], num_tokens=recall.num_tokens)
