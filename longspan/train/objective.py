"""What a run makes small: weighted cross-entropy, or the preference loss of DPO.

Both are sums over tokens divided by one number of the whole step, so that a step may be computed
part by part (rows, and with context parallelism stretches of rows) and gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.train.batch import ANSWER, FILLER, Batch
from longspan.train.loss import ChunkLoss, token_nll, weighted_cross_entropy


class RowGroup(Protocol):
    """The processes that share a row, each with some of its places."""

    @property
    def size(self) -> int:
        """Count them."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Add up what each of them has; no gradients."""
        ...


@dataclass(frozen=True, slots=True)
class Targets:
    """A batch with every token moved to the place that predicts it."""

    ids: Tensor
    """int64 [B, T]: what each place sees."""
    targets: Tensor
    """int64 [B, T]: what each place predicts."""
    weights: Tensor
    """fp32 [B, T]: what that counts; 0 at the last place of a row."""
    kinds: Tensor
    """int64 [B, T]: kind of what is predicted; -1 at the last place."""
    reference: Tensor | None = None
    """fp32 [B]; see `Batch`."""

    @classmethod
    def of(cls, batch: Batch) -> Targets:
        """Shift a batch by one."""
        targets, kinds = (x.roll(-1, 1).long() for x in (batch.ids, batch.kinds))
        weights = batch.weights.roll(-1, 1)
        weights[:, -1] = 0.0
        kinds[:, -1] = -1
        return cls(batch.ids.long(), targets, weights, kinds, batch.reference)

    def rows(self, start: int, stop: int) -> Targets:
        """Return rows [start, stop)."""
        part = self._each(lambda x: x[start:stop])
        reference = None if self.reference is None else self.reference[start:stop]
        return replace(part, reference=reference)

    def at(self, places: Tensor) -> Targets:
        """Return some places of each row, int64 [t]."""
        return self._each(lambda x: x[:, places])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Targets:
        return Targets(change(self.ids), change(self.targets), change(self.weights),
                       change(self.kinds), self.reference)


class Objective(Protocol):
    """Loss of a part of a step."""

    @property
    def rows_together(self) -> int:
        """Rows that only make sense together."""
        ...

    def total(self, targets: Targets, group: RowGroup) -> Tensor:
        """Return this process's share of what the sums of a step are divided by, []."""
        ...

    def __call__(
        self, hidden: Tensor, head: Tensor, part: Targets, total: Tensor, group: RowGroup
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [] of a part, and sums for the log; hidden [B, T, M], head [V, M]."""
        ...


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Weighted mean over tokens: pre-training and fine-tuning."""

    token_bytes: Tensor
    """fp32 [V]: bytes of each token, for bits per byte."""
    chunk_loss: ChunkLoss
    rows_together: int = 1

    def total(self, targets: Targets, group: RowGroup) -> Tensor:
        """Sum of the weights."""
        return targets.weights.sum()

    def __call__(
        self, hidden: Tensor, head: Tensor, part: Targets, total: Tensor, group: RowGroup
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective`."""
        targets = part.targets.flatten()
        loss, nll, hit = weighted_cross_entropy(
            hidden.flatten(0, 1), head, targets, (part.weights / total).flatten(), self.chunk_loss)
        is_filler, is_answer = (part.kinds.flatten() == kind for kind in (FILLER, ANSWER))
        return loss, {
            "loss": loss.detach(), "filler_nll": (nll * is_filler).sum(),
            "filler_bytes": (self.token_bytes[targets] * is_filler).sum(),
            "answer_hits": (hit & is_answer).sum().float(), "answers": is_answer.sum().float()}


@dataclass(frozen=True, slots=True)
class Preference:
    """DPO (arXiv 2305.18290): rows come in pairs, the better answer first.

    With a margin m = (log p - log p_ref)(better) - (log p - log p_ref)(worse), summed over the
    answers' tokens, the loss is -log sigmoid(beta m). Its gradient in every token's nll is one
    number a row: a pass without gradients finds it, and weighted cross-entropy does the rest.
    """

    chunk_loss: ChunkLoss
    beta: float
    by_length: bool
    """Divide log-probabilities by the answer's tokens: long answers are then no advantage."""
    sft_weight: float
    """Weight of the better answer's mean nll, which keeps its probability from sinking."""
    rows_together: int = 2

    def total(self, targets: Targets, group: RowGroup) -> Tensor:
        """Count the pairs."""
        return _is_pair(targets, group).sum() / group.size

    def __call__(
        self, hidden: Tensor, head: Tensor, part: Targets, total: Tensor, group: RowGroup
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective`; the part's rows are whole pairs."""
        assert part.reference is not None, "pairs carry the reference's log-probabilities"
        flat, targets = hidden.flatten(0, 1), part.targets.flatten()
        nll, hit = token_nll(flat.detach(), head.detach(), targets)
        lengths = group.sum(part.weights.sum(1)).clamp_min(1.0)
        scale = lengths.reciprocal() if self.by_length else torch.ones_like(lengths)
        gained = -group.sum((nll.view_as(part.weights) * part.weights).sum(1)) - part.reference
        gained = gained * scale
        margins = self.beta * (gained[0::2] - gained[1::2])
        is_pair = _is_pair(part, group)
        push = is_pair * self.beta * torch.sigmoid(-margins) / total
        row_weights = torch.stack((push, -push), 1).flatten() * scale
        better = torch.arange(len(lengths), device=lengths.device) % 2 == 0
        row_weights = row_weights + self.sft_weight * better / lengths / total
        # The value is the surrogate's, the gradient the loss's.
        surrogate, _, _ = weighted_cross_entropy(
            flat, head, targets, (part.weights * row_weights[:, None]).flatten(), self.chunk_loss)
        is_answer = (part.weights > 0).flatten() & better.repeat_interleave(part.ids.shape[1])
        return surrogate, {
            "loss": -(F.logsigmoid(margins) * is_pair).sum() / total / group.size,
            "pairs": is_pair.sum() / group.size,
            "margin": (margins * is_pair).sum() / self.beta / group.size,
            "right": ((margins > 0) & is_pair).sum() / group.size,
            "answer_hits": (hit & is_answer).sum().float(), "answers": is_answer.sum().float()}


@dataclass(frozen=True, slots=True)
class AnswerLogProbs:
    """No loss: the log-probability of each row's weighted tokens, for the reference of DPO."""

    rows_together: int = 1

    def total(self, targets: Targets, group: RowGroup) -> Tensor:
        """See `Objective`."""
        return torch.ones((), device=targets.ids.device)

    def __call__(
        self, hidden: Tensor, head: Tensor, part: Targets, total: Tensor, group: RowGroup
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective`."""
        nll, _ = token_nll(hidden.flatten(0, 1), head, part.targets.flatten())
        sums = group.sum((nll.view_as(part.weights) * part.weights).sum(1))
        return torch.zeros((), device=hidden.device), {"logprobs": -sums}


def _is_pair(part: Targets, group: RowGroup) -> Tensor:
    """Which pairs there are, bool [B / 2]; the others fill a step up."""
    return group.sum(part.weights.sum(1))[0::2] > 0
