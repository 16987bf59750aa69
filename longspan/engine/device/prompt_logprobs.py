"""Log-probabilities of prompt tokens, from the hidden states that prefill computes anyway.

The head is applied to a few rows at a time and only the wanted numbers are kept: a million rows
of logits would be 600 GB. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.attention.upload import upload
from longspan.engine.step import PromptLogprobs, ScheduledSlice
from longspan.ops.sampling.logits import token_logprobs

Head = Callable[[Tensor], Tensor]
"""[n, M] hidden states after the last layer to [n, V] fp32 logits."""
OnLogits = Callable[[int, Tensor], None]
"""Told which prompt token the first of some consecutive rows predicts, and their logits, [n, V]
fp32. It runs in the middle of a step and must change nothing."""


class ScoredRows(NamedTuple):
    """As `PromptLogprobs`, of n tokens and on the device until `cpu`."""

    request_id: str
    first: int
    logprobs: Tensor
    """[n] fp32"""
    top_ids: Tensor
    """[n, K] int64"""
    top_logprobs: Tensor
    """[n, K] fp32"""

    def cpu(self, *, non_blocking: bool = False) -> ScoredRows:
        """Copy to the host; with ``non_blocking`` the copy is complete when the stream is."""
        return ScoredRows(self.request_id, self.first, *(
            part.to("cpu", non_blocking=non_blocking) for part in self[2:]))

    def as_message(self) -> PromptLogprobs:
        """As `StepResult` wants them; waits for the device where they are still there."""
        return PromptLogprobs(
            request_id=self.request_id, first=self.first,
            logprobs=self.logprobs.numpy(force=True).tobytes(),
            top_ids=self.top_ids.numpy(force=True).astype(np.int32).tobytes(),
            top_logprobs=self.top_logprobs.numpy(force=True).tobytes())


class PromptScorer:
    """Collects the log-probabilities of one step after the other.

    Args:
        num_rows: that the head is applied to at a time.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._found = list[ScoredRows]()
        self.on_logits: OnLogits | None = None
        """Watches all logits that are scored."""

    def take(self) -> tuple[ScoredRows, ...]:
        """Return what was scored since the last call."""
        found, self._found = tuple(self._found), []
        return found

    def score(self, head: Head, item: ScheduledSlice, hidden: Tensor, start: int) -> None:
        """Score the tokens behind some rows of a slice, where it asks for them.

        Args:
            hidden: [n, M] of the tokens from ``start`` on.
        """
        scored = item.scored
        assert scored is not None
        first = max(scored.first, start + 1)
        stop = min(scored.first + len(scored.token_ids), start + 1 + len(hidden))
        if first >= stop:
            return
        rows = hidden[first - 1 - start : stop - 1 - start]
        token_ids = torch.frombuffer(scored.token_ids, dtype=torch.int32).long()
        targets = upload(token_ids[first - scored.first : stop - scored.first], hidden.device)
        parts = list[tuple[Tensor, Tensor, Tensor]]()
        for few, wanted in zip(rows.split(self._num_rows), targets.split(self._num_rows),
                               strict=True):
            logits = head(few)
            if self.on_logits is not None:
                self.on_logits(first + len(parts) * self._num_rows, logits)
            parts.append(token_logprobs(logits, wanted, scored.num_top))
        logprobs, top_ids, top = (torch.cat(same) for same in zip(*parts, strict=True))
        self._found.append(ScoredRows(item.request_id, first, logprobs, top_ids, top))
