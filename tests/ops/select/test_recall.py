"""Recall of a selection against a slow independent restatement, on the CPU and in Triton."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from longspan.ops.select import recall, triton_recall
from longspan.ops.select.eager import select_vertical_slash
from longspan.ops.types import Budget, Selection
from tests.conftest import SEED, assert_close
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

PLAIN = Positions(4096, 96)
ZONED = Positions(128, 32)  # stride 96: six tiles of 16
RELEASED = (Positions(2048, 64), Positions(1024, 32))  # 262,144 / 8,192 and 131,072 / 4,096
CASES = [(PLAIN, 0, 5), (PLAIN, 80, 299), (PLAIN, 192, 193), (ZONED, 96, 192), (ZONED, 304, 347),
         *((positions, 2 * positions.stride + 32, 2 * positions.stride + 60)
           for positions in RELEASED)]


def selection_of(case: Case, start: int, num_scouts: int, lists: bool = True) -> Selection:
    heads = case.q.shape[1]
    limits = Budget((9,) * heads, (40,) * heads, "tile", 16, 0, 4, 20, num_scouts, -1.0, 3)
    selection = select_vertical_slash(
        case.q[start:], oracle.only_first(case, len(case.q)), case.block_table, start, case.rotary,
        case.scale, limits)
    if lists and num_scouts:  # more of them than scouts find in so short a prompt
        listed = oracle.with_lists(random.Random(SEED), selection, start, len(case.q))
        assert listed.tiles is not None
        return listed._replace(tiles=listed.tiles.to(case.q.device))
    return selection


def expected(case: Case, positions: Positions, start: int, selection: Selection) -> Tensor:
    """Row by row: the softmax over all keys at DCA's positions, summed over the union of what the
    selection keeps."""
    length = len(case.k)
    rows = recall.place_rows(length - start, selection).cpu()
    seen = oracle.union(selection, start, length)
    scores = oracle.scores(
        case.q[start:].cpu(), case.k, oracle.distance_matrix(length, positions, start),
        case.rotary.inv_freq.cpu()) * case.scale
    weights = scores.masked_fill(~oracle.causal(length, start), -math.inf).softmax(-1)
    every = (weights * seen).sum(-1)
    return torch.stack([every[head, rows[head]] for head in range(len(rows))])


def run(module: str, case: Case, start: int, selection: Selection) -> Tensor:
    args = (case.q[start:], oracle.only_first(case, len(case.q)), case.block_table, start,
            case.rotary, case.scale, selection)
    return (recall.measure_recall(*args) if module == "eager"
            else triton_recall.measure_recall(*args, num_programs=3))


@pytest.mark.parametrize("num_scouts", [0, 12], ids=["typical", "with-scouts"])
@pytest.mark.parametrize(("positions", "start", "length"), CASES, ids=str)
@pytest.mark.parametrize(
    ("module", "kernel_device"), [("eager", "cpu"), ("triton", "cpu")], indirect=["kernel_device"],
    ids=["eager", "triton"])
def test_recall_equals_slow_restatement(
    module: str, positions: Positions, start: int, length: int, num_scouts: int,
    kernel_device: str,
) -> None:
    """Three heads for each of two KV heads; NaN in all slots beyond the context; the same twice."""
    case = oracle.make_case(length, positions, num_heads=6, num_kv_heads=2, gain=1.2,
                            block_size=32 if start > 1000 else 16, device=kernel_device)
    selection = selection_of(case, start, num_scouts)
    found = run(module, case, start, selection)
    wanted = expected(case, positions, start, selection)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert_close(found, wanted.float(), "recall")
    assert torch.equal(found, run(module, case, start, selection))
    if length > 192 + 1:
        assert wanted.min() < 0.9, "nothing was dropped"


def test_rows_are_spread_over_the_segment_and_its_scouts() -> None:
    scouts = torch.arange(64).repeat(3, 1)
    selection = Selection(torch.zeros(3, 1).long(), torch.zeros(3, 1).long(), 16, True,
                          scouts=scouts)
    rows = recall.place_rows(1000, selection)
    assert rows[0, :8].tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert rows[2, 8:].tolist() == [4, 12, 20, 28, 36, 44, 52, 60]
    assert recall.place_rows(3, selection._replace(scouts=None)).tolist() == [[0, 1, 2]] * 3
