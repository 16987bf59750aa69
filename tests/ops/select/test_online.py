"""Budgets that follow a chunk's recall: which multiple each head gets, and that scouts follow."""

from __future__ import annotations

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
def test_each_head_gets_the_least_multiple_that_suffices(target: float, device: str) -> None:
    """One multiple after the other, all heads at once, by hand; stopping early changes nothing."""
    args = inputs(make_case(device))
    found = select_online(*args, budget(target))
    every = [select(*args, online.scaled(budget(target), factor))
             for factor in online.FACTORS]
    recalls = [measure(*args, one).mean(1) for one in every]
    chosen = set()
    for head in range(6):
        step = next((i for i, values in enumerate(recalls) if values[head] >= target), 4)
        chosen.add(step)
        assert entries(found, head) == entries(every[step], head)
    assert len(chosen) > 1, "all heads alike: nothing was tested"
    patient = online.select_to_recall(
        lambda limits: select(*args, limits),
        lambda one: measure(*args, one), budget(target),
        may_stop=False)
    assert all(entries(patient, head) == entries(found, head) for head in range(6))


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
