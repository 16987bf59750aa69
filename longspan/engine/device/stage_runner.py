"""A pipeline's ranks: each computes its layers of every step, in the same order.

Activations go on from rank to rank, and the rows that are wanted from the last one back to the
first, which has the embedding, the head and the sampler: that is where the next token begins, and
where all that is known of a request's sampling stands. While later ranks compute a step the first
ones are at the steps behind it. The first rank takes a step's rows back as late as it can, when its
result is wanted or when a later step needs the token: what was launched meanwhile need not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import Tensor

from longspan.attention.layer import Selector
from longspan.attention.observer import AttentionObserver
from longspan.attention.ranks import RowSharing
from longspan.attention.recall import RecallSums
from longspan.engine.control.transport import LocalTransport, Transport
from longspan.engine.device.batch import num_outputs, rows_here
from longspan.engine.device.launched_step import LaunchedStep, Stopwatch
from longspan.engine.device.prompt_logprobs import OnLogits
from longspan.engine.device.runner import BegunStep, Runner
from longspan.engine.device.sampling import SampledTokens
from longspan.engine.device.stage import StageLink
from longspan.engine.device.timeline import Spans
from longspan.engine.step import ScheduledBatch, ScheduledSlice, SparseRecall, StepResult
from longspan.ops.types import PagedKV


class StageRunner:
    """One rank's side of every step.

    Args:
        runner: has this rank's layers, and was loaded with the same link.
        tells: it says what was counted in its layers. Of a stage's ranks one does: all know the
            same, and what the ranks of a pipeline say is added up.
    """

    def __init__(self, runner: Runner, link: StageLink, *, tells: bool = True) -> None:
        self.runner, self._link, self._tells = runner, link, tells
        self._unfinished = deque[StagedStep]()

    def transport(self) -> Transport:
        """For a loop in this process."""
        return LocalTransport(self, self.max_in_flight)

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first layers, the head and the sampler."""
        return self._link.index == 0

    @property
    def max_in_flight(self) -> int:
        """Steps that keep all stages busy, and one more that waits for the first of them."""
        return self._link.count + 1

    @property
    def caches(self) -> list[PagedKV]:
        """Keys and values of this rank's layers."""
        return self.runner.caches

    def record_graphs(self) -> None:
        """Do nothing: steps of a pipeline are launched kernel by kernel."""

    def compile_ahead(self, steps: Iterable[ScheduledBatch]) -> None:
        """Compute steps, which all ranks do, for what they compile."""
        self.runner.clear_caches()
        for step in steps:
            self.launch(step)
        self.finish_all()
        self.runner.observed(counts_pairs=True)

    def observe(self, observer: AttentionObserver | None) -> None:
        """Tell ``observer`` what attention does in this rank's layers; None: nobody."""
        self.runner.observe(observer)

    def select_by(self, selector: Selector | None) -> None:
        """Let ``selector`` choose what sparse prefill keeps in this rank's layers."""
        self.runner.select_by(selector)

    def trace(self) -> None:
        """As `Runner.trace`, of this rank's layers."""
        self.runner.trace()

    def traced(self) -> Spans:
        """As `Runner.traced`."""
        return self.runner.traced()

    def watch_logits(self, on_logits: OnLogits | None) -> None:
        """Show ``on_logits`` the logits of prompt tokens, where the head is; None: nobody."""
        self.runner.watch_logits(on_logits)

    def prepare(self, constraint: str | None = None) -> None:
        """As `Runner.prepare`, in this process."""
        self.runner.prepare(constraint)

    def peak_memory_bytes(self) -> int:
        """Highest use so far, of this rank."""
        return self.runner.peak_memory_bytes()

    def close(self) -> None:
        """Free weights and caches."""
        self.runner.close()

    def launch(self, batch: ScheduledBatch) -> StagedStep:
        """Compute this rank's layers of a step and send on what they give. One thread only.

        On the first rank a step that runs ahead waits for the tokens of those before it.
        """
        assert batch.repeats == 1, "steps of a pipeline are sent one by one"
        if any(item.is_run_ahead for item in batch.slices):
            self.finish_all()
        with torch.inference_mode():
            if self._link.index:
                for num_rows in sent_rows(batch.slices, self.runner.sharing):
                    self._link.fetch(num_rows)
            watch = self.runner.stopwatch()
            begun = self.runner.begin(batch) if batch.slices else None
            watch.stop()
            if self.runner.timeline is not None:
                self.runner.timeline.note(watch)
            if begun is not None:
                for rows in (begun.apart, begun.packed):
                    if rows is not None and rows.shape[0]:
                        self._link.send(rows)
            gives = any(item.sampling or item.scored for item in batch.slices)
            pairs, recalls = self.runner.observed(counts_pairs=gives and batch.prefills)
            if not self._tells:
                pairs, recalls = (0.0, 0.0), []
        step = StagedStep(self, batch, begun, watch, pairs, recalls)
        if self._link.index == 0:
            self._unfinished.append(step)
        else:
            step.sample()  # there is nothing to sample: it says what this rank has done
        return step

    def finish_all(self) -> None:
        """Take back the rows of all steps that are under way, and sample."""
        while self._unfinished:
            self._unfinished[0].sample()

    def finish_until(self, step: StagedStep) -> None:
        """Take back the rows of a step and of those before it, and sample."""
        while self._unfinished and step in self._unfinished:
            self._unfinished[0].sample()
        step.sample()

    def finish(self, step: StagedStep) -> SampledTokens | None:
        """Take back the rows of the oldest step under way, on the first rank, and sample."""
        if self._link.index:
            return None
        assert self._unfinished.popleft() is step, "steps are finished in their order"
        if step.begun is None:
            return None
        num_apart, num_packed = returned_rows(step.batch.slices)
        with torch.inference_mode():
            return self.runner.finish(BegunStep(
                step.begun.batch, step.begun.inputs,
                self._link.receive(num_apart) if num_apart else None,
                self._link.receive(num_packed) if num_packed else None))


@dataclass(slots=True, eq=False)
class StagedStep:
    """A step whose layers of this rank were launched."""

    runner: StageRunner
    batch: ScheduledBatch
    begun: BegunStep | None
    watch: Stopwatch
    """Times this rank's layers alone."""
    pairs: tuple[Tensor | float, float]
    recalls: Sequence[tuple[str, RecallSums]]
    _launched: LaunchedStep | None = None

    def wait_for(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s``; True if this rank's layers are computed."""
        return self.watch.wait_for(timeout_s)

    def sample(self) -> None:
        """Take the wanted rows back and sample, unless that was done; on the launching thread."""
        if self._launched is None:
            watch = self.runner.runner.stopwatch()
            sampled = self.runner.finish(self)
            self._launched = LaunchedStep(
                self.batch, sampled, self.pairs, watch, None, self.recalls)

    def wait(self) -> StepResult:
        """Wait for the step. Only the first rank has its tokens, and only after `sample`."""
        if self._launched is None:
            self.runner.finish_until(self)
        assert self._launched is not None
        return replace(self._launched.wait(), elapsed_s=self.watch.wait())


def merge(results: Sequence[StepResult]) -> StepResult:
    """Put what all ranks know of a step together, the first one's tokens first of all."""
    recalls = dict[str, SparseRecall]()
    for item in (recall for result in results for recall in result.recalls):
        known = recalls.get(item.request_id)
        recalls[item.request_id] = item if known is None else replace(
            known, typical=known.typical + item.typical, scouts=known.scouts + item.scouts,
            typical_weight=known.typical_weight + item.typical_weight,
            scouts_weight=known.scouts_weight + item.scouts_weight)
    return replace(
        results[0], recalls=tuple(recalls.values()),
        elapsed_s=max(result.elapsed_s for result in results),
        kept_pairs=sum(result.kept_pairs for result in results),
        causal_pairs=sum(result.causal_pairs for result in results))


def sent_rows(items: Sequence[ScheduledSlice], sharing: RowSharing | None) -> list[int]:
    """Count the rows that go from stage to stage: of the sparse chunk, of the other slices; where a
    stage's ranks share them, those of one rank."""
    apart = sum(rows_here(item, sharing) for item in items if item.pieces is not None)
    packed = sum(rows_here(item, sharing) for item in items if item.pieces is None)
    return [count for count in (apart, packed) if count]


def returned_rows(items: Sequence[ScheduledSlice]) -> tuple[int, int]:
    """Count the rows that the last stage returns: of the sparse chunk, which is computed apart, and
    of the other slices."""
    apart = packed = 0
    for item in items:
        if item.pieces is None:
            packed += num_outputs(item)
        else:
            apart = item.query_len if item.scored else int(item.context_len >= item.prompt_len)
    return apart, packed
