"""Budgets of a prefill chunk that follow its own recall: no calibration, the same selection.

Every head is selected for with a few multiples of its budgets, from one pass of the probe rows, and
each time the share of attention mass that the chunk's typical rows keep (`recall.place_rows`) is
measured. The heads of a layer then share what is bought: the steps that bring most recall for what
they cost come first, until the mean over the heads reaches the target. So a head that pays nothing
back stays small, and one whose attention is spread over everything is made up for by the others.
Which multiple a head gets depends on nothing but the chunk and what is before it, so answers stay a
function of the prompt. Nothing waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.types import Budget, Selection

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Multiples of the plan's budgets, from the floor to the cap."""


def select_to_recall(
    select: Callable[[Sequence[Budget]], list[Selection]], measure: Callable[[Selection], Tensor],
    budget: Budget,
) -> Selection:
    """Return the columns and windows of each head's own multiple, in tile mode, without scouts.

    Args:
        select: selects one segment by each of several budgets.
        measure: gives the recall of rows of that segment, [H, R].
    """
    found = select([scaled(budget, factor) for factor in FACTORS])
    recalls = torch.stack([measure(selection).mean(1) for selection in found])
    return merged(found, choose_steps(recalls, torch.stack([*map(_cost, found)]), budget.recall))


def choose_steps(recalls: Tensor, costs: Tensor, target: float) -> Tensor:
    """Choose a step for each head, so that their mean recall reaches the target at least cost.

    recalls, costs: [F, H], of each of F growing budgets. Returns [H] int64, the last step for all
    where the target is out of reach. Of steps that bring less for their cost than later ones of
    their head, those later ones are taken in one go.
    """
    recalls = recalls.cummax(0).values.double()
    costs = costs.double()
    num_heads = recalls.shape[1]
    values = []
    for step in range(1, len(recalls)):  # the steepest way on from the step before
        rise = recalls[step:] - recalls[step - 1]
        values.append((rise / (costs[step:] - costs[step - 1]).clamp_min(1)).amax(0))
    value = torch.stack(values).cummin(0).values.flatten()
    order = torch.sort(value, descending=True, stable=True).indices
    gains = (recalls[1:] - recalls[:-1]).flatten()[order]
    before = recalls[0].sum() + gains.cumsum(0) - gains
    taken = torch.zeros_like(value)
    taken[order] = (before < target * num_heads).to(value.dtype)
    return taken.unflatten(0, (-1, num_heads)).sum(0).long()


def scaled(budget: Budget, factor: float) -> Budget:
    """Return a multiple of the budgets, without scouts and to be taken as it stands."""
    vertical, slash = (tuple(math.ceil(factor * count) for count in counts)
                       for counts in (budget.vertical, budget.slash))
    return budget._replace(vertical=vertical, slash=slash, num_scouts=0, recall=0.0)


def merged(found: Sequence[Selection], steps: Tensor) -> Selection:
    """Return a selection that takes each head from the one that ``steps``, [H], names; the last is
    the widest."""
    last = found[-1]

    def take(parts: Sequence[Tensor], padding: int) -> Tensor:
        wide = torch.stack([pad(part, (0, parts[-1].shape[1] - part.shape[1]), value=padding)
                            for part in parts])
        return wide.gather(0, steps[None, :, None].expand(1, -1, wide.shape[2]))[0]

    return last._replace(columns=take([one.columns for one in found], -1),
                         offsets=take([one.offsets for one in found], last.tile_len))


def _cost(selection: Selection) -> Tensor:
    """Return the keys that a query far from the beginning keeps, [H]."""
    windows = (selection.offsets < selection.tile_len).sum(1)
    return (selection.columns >= 0).sum(1) + selection.tile_len * windows
