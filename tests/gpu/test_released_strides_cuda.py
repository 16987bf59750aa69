"""Kernels, compiled, around borders of DCA's chunks of 253,952 and 126,976 tokens at true size.

What CPUs cannot interpret in time (`tests/ops/test_released_strides.py` has the rest): dense rows,
sparse rows with coarse means, selection with scouts, and recall, each over all keys.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.ops import reference
from longspan.ops.dense import triton as dense_triton
from longspan.ops.select import eager as select
from longspan.ops.select import recall, triton_recall
from longspan.ops.select import triton as select_triton
from longspan.ops.sparse import triton as sparse_triton
from longspan.ops.types import Budget, Selection
from tests.conftest import SEED, assert_close
from tests.gpu.test_prefill_cuda import BLOCK, DEVICE, Case, make_case
from tests.ops import oracle

pytestmark = pytest.mark.gpu
HEADS = 4
RELEASED = [pytest.param((262_144, 8_192), id="253952"),
            pytest.param((131_072, 4_096), id="126976")]
"""chunk_size and local_size."""
# They take what `rows` gives, and mypy does not see how much that is.
select_eager: Any = select.select_vertical_slash
measure_eager: Any = recall.measure_recall
measure_triton: Any = triton_recall.measure_recall


@pytest.fixture(scope="module", params=RELEASED)
def far(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Two whole DCA chunks of one request, and two query tiles of the third."""
    chunk_size, local_size = request.param
    torch.manual_seed(SEED)
    yield make_case(2 * (chunk_size - local_size) + 2 * BLOCK, chunk_size=chunk_size,
                    local_size=local_size, heads=HEADS, kv_heads=2)


def rows(case: Case, start: int, count: int) -> Any:
    return (case.q[start : start + count], *case.args(0)[1:3], start, case.rotary, case.scale)


def choice(start: int, count: int, stride: int) -> Selection:
    """Windows, columns and lists on both sides of the borders, and between them."""
    tile, border = start // BLOCK, stride // BLOCK
    gaps = sorted({0, 1, border - 1, border, border + 1, tile // 2 + 3, tile - 1, tile})
    places = sorted({0, 5, stride - 1, stride, start - stride // 2, start - 1, start})
    chosen = Selection(
        torch.tensor([places] * HEADS, device=DEVICE),
        torch.tensor([[-BLOCK * gap for gap in gaps]] * HEADS, device=DEVICE), BLOCK, aligned=True,
        max_columns=(len(places),) * HEADS, near_tiles=128)
    return oracle.with_lists(random.Random(SEED), chosen, start, start + count, 12)


def test_dense_rows_on_both_sides_of_a_border(far: Case) -> None:
    """By every path that a prefill may take."""
    for border in (1, 2):
        args = rows(far, border * far.rotary.stride - 40, 80)
        expected, expected_lse = reference.prefill_attention(*args)
        for attend in (ops.prefill_attention, dense_triton.prefill_attention):
            out, lse = attend(*args)
            assert_close(out, expected, f"out at border {border}")
            assert_close(lse, expected_lse, "lse", torch.bfloat16)


def test_sparse_rows_and_coarse_means(far: Case) -> None:
    """By every path; coarse means of all zones."""
    for border in (1, 2):
        start = border * far.rotary.stride
        args = (*rows(far, start, BLOCK), choice(start, BLOCK, far.rotary.stride), True)
        expected, expected_lse, expected_kept = reference.sparse_prefill_attention(*args)
        for attend in (ops.sparse_prefill_attention, sparse_triton.sparse_prefill_attention):
            out, lse, kept = attend(*args)
            assert float(kept) == float(expected_kept)
            assert_close(out, expected, f"out at border {border}")
            assert_close(lse, expected_lse, "lse", torch.bfloat16)


def test_selection_keeps_as_much_as_the_specification(far: Case) -> None:
    """Columns, windows and lists; near ties may fall either way, so the kept mass must agree."""
    args = rows(far, 2 * far.rotary.stride, 2 * BLOCK)
    limits = Budget((256,) * HEADS, (1024,) * HEADS, "tile", 64, 0, 4, 256, 24, -4.0, 32)
    assert select_triton.supports(args[0], args[1], far.rotary, args[3], limits)
    ours, theirs = (module.select_vertical_slash(*args, limits)
                    for module in (select_triton, select))
    assert ours.tiles is not None and bool((ours.tiles >= 0).any())
    kept, expected = (kept_mass(args, chosen) for chosen in (ours, theirs))
    assert bool((kept > 0.99 * expected).all()), f"{kept} of {expected}"


def kept_mass(args: Any, chosen: Selection) -> Tensor:
    """Mean mass that the rows of each head keep, a few rows at a time, [H]."""
    q, cache, table, start, rotary, scale = args
    stop, parts = start + len(q), []
    k, _ = reference.gather_kv(cache, table, stop)
    keys = torch.arange(stop, device=DEVICE)
    for first in range(start, stop, 32):
        queries = torch.arange(first, first + 32, device=DEVICE)
        scores = reference.dca_scores(q[first - start :][:32], k, queries, keys, rotary) * scale
        weights = scores.masked_fill_(keys > queries[:, None], -torch.inf).softmax(-1)
        parts.append((weights * reference.kept_pairs(chosen, queries, stop)).sum(-1))
    return torch.cat(parts, 1).mean(1)


def test_recall_equals_the_specification(far: Case) -> None:
    """What `--recall` measures."""
    args = rows(far, 2 * far.rotary.stride, 2 * BLOCK)
    limits = Budget((256,) * HEADS, (1024,) * HEADS, "tile", 64, 0, 4, 256, 24, -4.0, 32)
    chosen = select_eager(*args, limits)
    found = measure_triton(*args, chosen, num_programs=132)
    assert_close(found, measure_eager(*args, chosen), "recall", torch.bfloat16)
