"""The sparse prefill chunk that may be paused between two steps, on its runner."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import pairwise

from torch import Tensor

from longspan.engine.control.chunking import row_cuts
from longspan.engine.device.batch import DeviceBatch, RequestMeter
from longspan.engine.device.prompt_logprobs import PromptScorer
from longspan.engine.device.stage import PipelineStage, StageLink
from longspan.engine.step import ScheduledSlice


class PausableChunk:
    """Computes one sparse chunk at a time, through all stages of this process.

    Args:
        rows: of one piece; the scheduler's `SchedulerConfig.piece_rows`.
        scorer: takes the log-probabilities of prompts that ask for them.
        link: this process has one of a pipeline's stages, and chunks are never paused.
    """

    def __init__(
        self, stages: Sequence[PipelineStage], rows: int, scorer: PromptScorer,
        link: StageLink | None = None,
    ) -> None:
        self._stages, self._rows, self._scorer, self._link = stages, rows, scorer, link
        self._work: Generator[None, None, Tensor] | None = None
        self._place = ("", 0, 0)
        """Request, first token and pieces done of the chunk in ``_work``."""
        self._meters: tuple[RequestMeter, ...] = ()

    def advance(
        self, item: ScheduledSlice, build: Callable[[], DeviceBatch],
    ) -> Tensor | None:
        """Compute the pieces of a slice, in inference mode.

        Args:
            build: makes the whole chunk's tensors; called when it begins.

        Returns [n, M], the hidden states of the rows that sample, when the chunk is complete; of a
        pipeline's stage what it gives.
        """
        pieces = item.pieces
        assert pieces is not None
        if self._link is not None:
            return self._advance_whole(item, build(), self._link)
        if pieces.first == 0:
            inputs = build()
            self._work = self._compute(item, inputs, self._cuts(item))
            self._meters = inputs.meters
            self._place = (item.request_id, item.cached_len, 0)
        assert self._work is not None and self._place == (
            item.request_id, item.cached_len, pieces.first), (self._place, item.request_id, pieces)
        self._place = (item.request_id, item.cached_len, pieces.stop)
        try:
            for _ in range(pieces.first, pieces.stop):
                next(self._work)
        except StopIteration as end:
            assert pieces.is_last, "the chunk has fewer pieces than the scheduler thinks"
            self._work = None
            hidden: Tensor = end.value
            return hidden
        assert not pieces.is_last, "the chunk has more pieces than the scheduler thinks"
        return None

    def take_meters(self) -> tuple[RequestMeter, ...]:
        """Return the recall of the chunk once it is complete, and forget it."""
        if self._work is not None:
            return ()
        meters, self._meters = self._meters, ()
        return meters

    def _advance_whole(
        self, item: ScheduledSlice, inputs: DeviceBatch, link: StageLink,
    ) -> Tensor:
        """Compute this stage's part of a chunk without a pause; its rows are cut as ever."""
        assert item.pieces is not None and item.pieces.first == 0 and item.pieces.is_last
        (stage,) = self._stages
        rows = inputs.token_ids  # of this rank
        hidden = rows if link.index == 0 else link.receive(len(rows))
        work = stage.model.forward_in_pieces(
            hidden, inputs.metadata, stage.caches, self._cuts(item),
            cut_last=item.scored is not None)
        self._meters = inputs.meters
        while True:
            try:
                next(work)
            except StopIteration as end:
                found: Tensor = end.value
                return found

    def score(self, item: ScheduledSlice, hidden: Tensor) -> Tensor:
        """Take the log-probabilities of a whole chunk's tokens, [T, M] after the last layer, with
        the head of this process. Returns the rows that sample."""
        head = self._stages[0].model.logits
        for start, stop in pairwise(self._cuts(item)):
            rows = hidden[start - item.cached_len : stop - item.cached_len]
            self._scorer.score(head, item, rows, start)
        return hidden[len(hidden) - int(item.context_len == item.prompt_len):]

    def _cuts(self, item: ScheduledSlice) -> list[int]:
        return row_cuts(item.cached_len, item.context_len, self._rows)

    def _compute(
        self, item: ScheduledSlice, inputs: DeviceBatch, cuts: Sequence[int],
    ) -> Generator[None, None, Tensor]:
        """Compute the chunk, yielding between pieces: n pieces, n - 1 pauses."""
        is_scored = item.scored is not None
        hidden = inputs.token_ids
        for number, stage in enumerate(self._stages):
            if number:
                yield
            hidden = yield from stage.model.forward_in_pieces(
                hidden, inputs.metadata, stage.caches, cuts, cut_last=is_scored)
        if not is_scored:
            return hidden
        for start, stop in pairwise(cuts):
            yield
            rows = hidden[start - item.cached_len : stop - item.cached_len]
            self._scorer.score(self._stages[-1].model.logits, item, rows, start)
        return hidden[len(hidden) - int(stop == item.prompt_len):]
