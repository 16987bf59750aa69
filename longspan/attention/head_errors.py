"""What sparse prefill keeps and gets wrong, by layer and head, beside dense attention of the same
queries, keys and values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.observer import AttendedRows, AttentionObserver

FIFTH = 0.05


class Spread(NamedTuple):
    """Mean, border of the worst twentieth, and worst of one head's queries."""

    mean: float
    fifth: float
    worst: float


class HeadErrors(AttentionObserver):
    """Recall, the attention mass that each head's selection keeps (exp(lse_sparse - lse_full)), and
    the error of its output. Dense rows are not counted: they keep everything.

    Args:
        from_position: earlier queries are not counted.
        every: one query tile of so many is compared, the same ones however prefill is cut: dense
            attention of all of them would cost as much as a dense prefill.
        skipped_layer: for a last layer that computes few rows.
        with_errors: also of outputs.
    """

    def __init__(
        self, *, from_position: int = 0, every: int = 1, skipped_layer: int | None = None,
        with_errors: bool = False,
    ) -> None:
        self._from, self._every, self._skipped = from_position, every, skipped_layer
        self._with_errors = with_errors
        self._recalls: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._errors: defaultdict[int, list[Tensor]] = defaultdict(list)

    def attended(self, rows: AttendedRows) -> None:
        """Compare with dense attention of the same queries."""
        if rows.selection is None or rows.layer_idx == self._skipped or rows.start < self._from:
            return
        for part in self._sampled(rows):
            self._recalls[rows.layer_idx].append(part.recall().cpu())
            if self._with_errors:
                self._errors[rows.layer_idx].append(part.output_error().cpu())

    def recalls(self) -> list[list[Spread]]:
        """Recall of each layer's heads, the worst at its low end; no layers where nothing was
        sparse."""
        return [_spreads(parts, is_worst_low=True) for _, parts in sorted(self._recalls.items())]

    def errors(self) -> list[list[Spread]]:
        """Relative error of each layer's heads' outputs, the worst at its high end."""
        return [_spreads(parts, is_worst_low=False) for _, parts in sorted(self._errors.items())]

    def _sampled(self, rows: AttendedRows) -> Iterator[AttendedRows]:
        if self._every == 1:
            yield rows
            return
        size, stop = rows.cache.k.shape[1], rows.start + len(rows.q)
        for tile in range(rows.start // size, -(-stop // size)):
            if tile % self._every == self._every - 1:
                yield rows.part(max(rows.start, tile * size), min(stop, (tile + 1) * size))


def _spreads(parts: list[Tensor], *, is_worst_low: bool) -> list[Spread]:
    rows = torch.cat(parts).double()
    fifth = torch.quantile(rows, FIFTH if is_worst_low else 1 - FIFTH, dim=0)
    worst = rows.amin(0) if is_worst_low else rows.amax(0)
    return [Spread(*map(float, head)) for head in zip(rows.mean(0), fifth, worst, strict=True)]
