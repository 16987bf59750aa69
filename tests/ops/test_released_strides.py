"""Strides of 253,952 and 126,976 at their true sizes: a few query rows at borders of DCA's chunks.

All keys before the rows are there, so positions, zones and tiles are those of a million-token
prompt; what would read all of them one interpreted kernel step at a time is left to `tests/gpu`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.ops import decode, reference
from longspan.ops.dense import eager as eager_dense
from longspan.ops.geometry import near_border
from longspan.ops.select import recall
from longspan.ops.select.eager import select_vertical_slash
from longspan.ops.sparse import eager as eager_sparse
from longspan.ops.sparse import triton as triton_sparse
from longspan.ops.types import Budget, KeySpans, PagedKV, Selection
from tests.conftest import SEED, assert_close, error_ratio
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

TILE = 64
MANY_KEYS = 2e-5
"""Error of a row over half a million keys in fp32. Terms are 140 and 580 times their sum, and a
CPU's vectors add up long runs of them: 1.1e-5 and 1.2e-5, with values in fp64 3e-7 and 5e-6."""
RELEASED = [pytest.param(Positions(262_144, 8_192), id="253952"),
            pytest.param(Positions(131_072, 4_096), id="126976")]
"""Chunk size and local size of the million-token checkpoints."""
# They take what `rows` gives, and mypy does not see how much that is.
select: Any = select_vertical_slash
select_online: Any = ops.select_vertical_slash
measure: Any = recall.measure_recall
specified: Any = reference.sparse_prefill_attention


@pytest.fixture(scope="module", params=RELEASED)
def far(request: pytest.FixtureRequest) -> Iterator[tuple[Case, Positions]]:
    """Two whole DCA chunks of one request, and one query tile of the third: rows of all zones."""
    positions: Positions = request.param
    torch.manual_seed(SEED)
    yield oracle.make_case(2 * positions.stride + TILE, positions, num_heads=1, with_means=True,
                           block_size=TILE), positions


def rows(case: Case, start: int, stop: int, device: str = "cpu") -> Any:
    """What ops take first, with NaN in all slots from ``stop`` on."""
    used = -(-stop // TILE)
    k, v = (x.clone() for x in case.cache[:2])
    for copy in (k, v):
        copy[case.block_table[used:]] = torch.nan
        copy[case.block_table[used - 1], (stop - 1) % TILE + 1 :] = torch.nan
    cache = PagedKV(*(x.to(device) for x in (k, v, *case.cache[2:4]) if x is not None))
    return (case.q[start:stop].to(device), cache, case.block_table.to(device), start,
            oracle.moved(case.rotary, device), case.scale)


def test_dense_rows_on_both_sides_of_a_border(far: tuple[Case, Positions]) -> None:
    """The last row of a DCA chunk and the first of the next, against the oracle of single pairs."""
    case, positions = far
    start, stop = 2 * positions.stride - 1, 2 * positions.stride + 1
    part = case._replace(q=case.q[:stop], k=case.k[:stop], v=case.v[:stop])
    expected, expected_lse = oracle.dense(part, positions, start)
    for impl in (reference, eager_dense):
        out, lse = impl.prefill_attention(*rows(case, start, stop))
        assert error_ratio(out, expected) < MANY_KEYS, impl.__name__
        assert_close(lse, expected_lse, f"lse, {impl.__name__}")


def test_decode_around_borders(far: tuple[Case, Positions], kernel_device: str) -> None:
    """One request at several lengths: keys on both sides of the last border behind the row."""
    case, positions = far
    stride = positions.stride
    lens = torch.tensor([stride + 1, 2 * stride, 2 * stride + 1, 2 * stride + TILE])
    first = torch.tensor([stride, stride, 2 * stride, 2 * stride]) - 2 * TILE
    spans = KeySpans(first, (lens - first).clamp(max=4 * TILE))
    _, cache, table, _, rotary, scale = rows(case, 0, int(lens.max()), kernel_device)
    args = (case.q[lens - 1].to(kernel_device), cache, table.expand(4, -1), lens.to(kernel_device),
            rotary, torch.full((4,), scale, device=kernel_device))
    parts = KeySpans(spans.first.to(kernel_device), spans.length.to(kernel_device))
    expected, expected_lse = reference.decode_attention(*args, parts)
    for impl in (decode, eager_dense):
        out, lse = impl.decode_attention(*args, parts)
        assert_close(out, expected, f"out, {impl.__name__}")
        assert_close(lse, expected_lse, f"lse, {impl.__name__}")


def choice(start: int, stop: int, stride: int) -> Selection:
    """Windows, columns and lists on both sides of every border, and between them."""
    tile, border = start // TILE, stride // TILE
    gaps = sorted({0, 1, border - 1, border, border + 1, tile - 1, tile, tile // 2 + 3})
    places = sorted({0, 5, stride - 1, stride, start - stride // 2, start - 1, start})
    selection = Selection(torch.tensor([[*places, -1]]), torch.tensor(
        [[-TILE * gap for gap in gaps] + [TILE]]), TILE, aligned=True, near_tiles=16)
    return oracle.with_lists(random.Random(SEED), selection, start, stop, 9)


@pytest.mark.parametrize("impl", [eager_sparse, triton_sparse], ids=["eager", "triton"])
def test_sparse_rows_and_coarse_means(
    far: tuple[Case, Positions], impl: ModuleType, kernel_device: str
) -> None:
    """Most means are of eight tiles: of them all zones have some."""
    case, positions = far
    start = 2 * positions.stride
    assert near_border(start // TILE, 16) > start // TILE - 32
    args = rows(case, start, start + TILE, kernel_device)
    chosen = choice(start, start + TILE, positions.stride)
    assert chosen.tiles is not None
    chosen = chosen._replace(**{name: getattr(chosen, name).to(kernel_device)
                                for name in ("columns", "offsets", "tiles")})
    compare(impl, args, chosen, correction=True)


@pytest.mark.parametrize("impl", [eager_sparse, triton_sparse], ids=["eager", "triton"])
def test_windows_at_any_offset_over_a_border(
    far: tuple[Case, Positions], impl: ModuleType, kernel_device: str
) -> None:
    """Rows of two DCA chunks in one query tile."""
    case, positions = far
    start, stride = 2 * positions.stride - 9, positions.stride
    offsets = [0, -3, -70, -(stride - 5), -stride, -(stride + 77), -(2 * stride - 40)]
    chosen = Selection(torch.tensor([[0, stride - 1, stride, start - 1]], device=kernel_device),
                       torch.tensor([offsets], device=kernel_device), TILE, aligned=False)
    compare(impl, rows(case, start, start + 20, kernel_device), chosen, correction=False)


def compare(impl: ModuleType, args: Any, chosen: Selection, *, correction: bool) -> None:
    """Against the specification over all keys."""
    out, lse, kept = impl.sparse_prefill_attention(*args, chosen, correction)
    expected, expected_lse, expected_kept = specified(*args, chosen, correction)
    assert_close(out, expected, "out")
    assert_close(lse, expected_lse, "lse")
    assert float(kept) == float(expected_kept), "a pair counted twice or not at all"


def budget(**changes: Any) -> Budget:
    limits = Budget((9,), (600,), "tile", 8, 0, 4, 90, 12, -4.0, 3)
    return limits._replace(**changes)


def expected_recall(args: Any, chosen: Selection) -> Tensor:
    """What the measured rows keep, by the specification's scores of all pairs and its key sets."""
    q, cache, table, start, rotary, scale = args
    stop = start + len(q)
    queries, keys = torch.arange(start, stop), torch.arange(stop)
    k, _ = reference.gather_kv(cache, table, stop)
    scores = reference.dca_scores(q, k, queries, keys, rotary) * scale
    weights = scores.masked_fill(keys > queries[:, None], -torch.inf).softmax(-1)
    kept = (weights * reference.kept_pairs(chosen, queries, stop)).sum(-1)
    return kept.gather(1, recall.place_rows(len(q), chosen))


def test_recall_of_a_selection(far: tuple[Case, Positions]) -> None:
    """Rows of both kinds: typical ones and scouts."""
    case, positions = far
    start = 2 * positions.stride
    args = rows(case, start, start + TILE)
    chosen = select(*args, budget())
    assert chosen.tiles is not None and (chosen.tiles >= 0).any()
    found, wanted = measure(*args, chosen), expected_recall(args, chosen)
    assert found.shape == (1, 16) and wanted.min() > 0 and wanted.max() < 0.9
    assert_close(found, wanted, "recall")


def test_budgets_that_follow_recall(far: tuple[Case, Positions]) -> None:
    """They reach what the target asks for by the specification's count, which the plan's do not."""
    case, positions = far
    start, target = 2 * positions.stride, 0.01
    args = rows(case, start, start + TILE)
    chosen = select_online(*args, budget(num_scouts=0, recall=target))
    planned = select(*args, budget(num_scouts=0))
    before, reached = (float(expected_recall(args, one).mean()) for one in (planned, chosen))
    assert before < target <= reached + 1e-6
