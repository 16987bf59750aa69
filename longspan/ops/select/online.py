"""Budgets of a prefill chunk that follow its own recall: no calibration, the same selection.

Each head is given the least of a few multiples of its budgets with which the chunk's typical rows
(`recall.place_rows`) keep the target's share of their attention mass; heads that none satisfies
get the largest. Which multiple depends on nothing but the chunk and what is before it, so answers
stay a function of the prompt. Nothing waits for a GPU: there every multiple is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.types import Budget, Selection

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the plan's budgets, from the floor to the cap."""


def select_to_recall(
    select: Callable[[Budget], Selection], measure: Callable[[Selection], Tensor],
    budget: Budget, *, may_stop: bool,
) -> Selection:
    """Return the columns and windows of each head's own multiple, in tile mode, without scouts.

    Args:
        select: selects one segment by budgets.
        measure: gives the recall of rows of that segment, [H, R].
        may_stop: look at the results, and end when all heads have reached the target.
    """
    chosen: Selection | None = None
    reached: Tensor | None = None
    for factor in FACTORS:
        found = select(scaled(budget, factor))
        enough = measure(found).mean(1) >= budget.recall
        if chosen is None or reached is None:
            chosen, reached = found, enough
        else:
            chosen, reached = _merged(chosen, found, reached), reached | enough
        if may_stop and bool(reached.all()):
            break
    assert chosen is not None
    return chosen


def scaled(budget: Budget, factor: float) -> Budget:
    """Return a multiple of the budgets, without scouts and to be taken as it stands."""
    vertical, slash = (tuple(math.ceil(factor * count) for count in counts)
                       for counts in (budget.vertical, budget.slash))
    return budget._replace(vertical=vertical, slash=slash, num_scouts=0, recall=0.0)


def _merged(kept: Selection, more: Selection, is_kept: Tensor) -> Selection:
    """Return ``kept`` for the heads that are marked, [H] bool, and ``more`` for the others: it is
    at least as wide."""
    def merge(old: Tensor, new: Tensor, padding: int) -> Tensor:
        wide = pad(old, (0, new.shape[1] - old.shape[1]), value=padding)
        return torch.where(is_kept[:, None], wide, new)

    return more._replace(columns=merge(kept.columns, more.columns, -1),
                         offsets=merge(kept.offsets, more.offsets, more.tile_len))
