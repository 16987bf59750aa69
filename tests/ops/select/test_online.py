"""Budgets that follow a chunk's recall: which multiple each head gets, and that scouts follow."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from longspan import ops
from longspan.attention.sparsity import SparsityPlan
from longspan.errors import LongspanError
from longspan.ops.select import online, recall
from longspan.ops.select.eager import select_vertical_slash
from longspan.ops.types import Budget, Selection
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

PLAIN = Positions(4096, 96)
START, LENGTH = 256, 512
# They take what `inputs` gives, and mypy does not see how much that is.
select: Any = select_vertical_slash
select_online: Any = ops.select_vertical_slash
measure: Any = recall.measure_recall


def budget(target: float, num_scouts: int = 0) -> Budget:
    return Budget((24,) * 6, (96,) * 6, "tile", 16, 16, 4, 20, num_scouts, -1.0, 3,
                  recall=target)


def inputs(case: Case) -> Any:
    return (case.q[START:], oracle.only_first(case, LENGTH), case.block_table, START, case.rotary,
            case.scale)


def make_case(device: str) -> Case:
    """Six heads that differ: from nearly even weights to sharp ones."""
    q = torch.randn(LENGTH, 6, 16) * torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 8.0])[:, None]
    return oracle.make_case(LENGTH, PLAIN, num_kv_heads=2, q=q, device=device,
                            k=torch.randn(LENGTH, 2, 16))


@pytest.mark.parametrize("target", [0.2, 0.4, 0.6])
def test_heads_reach_the_target_together(target: float, device: str) -> None:
    """Each head has what one of the multiples gives it, and the mean recall over heads is the
    target's or more: not by the last step that any head was given."""
    args = inputs(make_case(device))
    found = select_online(*args, budget(target))
    every = [select(*args, online.scaled(budget(target), factor)) for factor in online.FACTORS]
    recalls = torch.stack([measure(*args, one).mean(1) for one in every])
    costs = torch.stack([online._cost(one) for one in every])
    steps = online.choose_steps(recalls, costs, target)
    assert len(set(steps.tolist())) > 1, "all heads alike: nothing was tested"
    for head, step in enumerate(steps.tolist()):
        assert entries(found, head) == entries(every[step], head)
    heads = torch.arange(6, device=steps.device)
    reached = float(recalls[steps, heads].mean())
    assert float(measure(*args, found).mean()) == pytest.approx(reached) and target < reached + 1e-6
    less = [recalls[(steps - (heads == head).long()).clamp(min=0), heads] for head in range(6)]
    assert min(float(values.mean()) for values in less) < target


@pytest.mark.parametrize("seed", range(20))
def test_steps_cost_little_more_than_the_best_ones(seed: int) -> None:
    """Beside every choice there is, for recalls that rise in any way: never more expensive than the
    cheapest that reaches the target by more than the dearest single step."""
    rng = torch.Generator().manual_seed(seed)
    recalls = torch.rand(4, 4, generator=rng).sort(0).values
    costs = (torch.rand(4, 4, generator=rng) * 90 + 10).cumsum(0).round()
    target = float(recalls[0].mean() + 0.6 * (recalls[-1].mean() - recalls[0].mean()))
    steps, heads = online.choose_steps(recalls, costs, target), torch.arange(4)
    assert recalls[steps, heads].mean() >= target - 1e-6
    best = min(float(costs[list(choice), heads].sum())
               for choice in itertools.product(range(4), repeat=4)
               if recalls[list(choice), heads].mean() >= target)
    assert costs[steps, heads].sum() <= best + (costs[-1] - costs[0]).max()


def test_targets_at_the_ends_of_what_there_is() -> None:
    recalls = torch.tensor([[0.5, 0.1], [0.6, 0.3], [0.65, 0.3]])
    costs = torch.tensor([[10, 10], [20, 20], [40, 40]])
    assert online.choose_steps(recalls, costs, 0.3).tolist() == [0, 0]  # reached by the least
    assert online.choose_steps(recalls, costs, 0.9).tolist() == [2, 2]  # out of reach
    assert online.choose_steps(recalls, costs, 0.4).tolist() == [0, 1]  # where it brings most
    assert online.choose_steps(recalls, costs, 0.46).tolist() == [2, 1]


def entries(selection: Selection, head: int) -> tuple[list[int], list[int]]:
    columns, offsets = selection.columns[head].tolist(), selection.offsets[head].tolist()
    return [c for c in columns if c >= 0], [o for o in offsets if o < selection.tile_len]


def test_scouts_look_at_what_the_chosen_budgets_miss(device: str) -> None:
    args = inputs(make_case(device))
    alone = select_online(*args, budget(0.7))
    found = select_online(*args, budget(0.7, 12))
    assert alone.tiles is None and found.tiles is not None and found.scouts is not None
    assert all(entries(alone, head) == entries(found, head) for head in range(6))
    assert (found.tiles >= 0).any()


def test_the_threshold_of_scouts_follows_the_target() -> None:
    """A key tile is listed where one key alone would bring the row below the target."""
    plan = SparsityPlan.default(1, 2)
    assert plan.layer(0).recall == 0 and plan.layer(0).scout_threshold == plan.scout_threshold
    for target in (0.5, 0.9):
        limits = SparsityPlan(vertical=plan.vertical, slash=plan.slash,
                              recall_target=target).layer(0)
        kept, missed = 1.0, math.exp(limits.scout_threshold)
        assert kept / (kept + missed) == pytest.approx(target) and limits.recall == target


@pytest.mark.parametrize("target", [0, 1, 95, -0.5, float("nan"), True, "0.9"])
def test_targets_out_of_range(target: object) -> None:
    plan = SparsityPlan.default(1, 2)
    with pytest.raises(LongspanError, match="above 0 and below 1"):
        SparsityPlan(vertical=plan.vertical, slash=plan.slash,
                     recall_target=target)  # type: ignore[arg-type]
