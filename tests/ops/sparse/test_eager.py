"""Vertical-slash prefill of both implementations against an fp64 oracle of key sets.

`eager_gather` (windows at any offset) is reached through `eager_sparse` with unaligned selections.
"""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch
from torch import Tensor

from longspan.ops import reference
from longspan.ops.dense import eager as eager_dense
from longspan.ops.sparse import eager as eager_sparse
from longspan.ops.types import PagedKV, Selection
from tests.conftest import SEED, assert_close, error_ratio
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(eager_sparse, id="eager")]
PLAIN = Positions(4096, 96)
ZONED = Positions(64, 16)  # stride 48: three tiles of 16 in a DCA chunk


def pack(columns: list[list[int]], offsets: list[list[int]], tile_len: int, aligned: bool,
         device: str = "cpu") -> Selection:
    """Lists for each head to the padded tensors that ops take."""
    width, count = max(map(len, columns)), max(map(len, offsets))
    return Selection(
        torch.tensor([row + [-1] * (width - len(row)) for row in columns],
                     dtype=torch.int64).reshape(len(columns), width).to(device),
        torch.tensor([row + [tile_len] * (count - len(row)) for row in offsets]).to(device),
        tile_len, aligned)


def tile_selection(rng: random.Random, heads: int, length: int, tile_len: int,
                   device: str = "cpu") -> Selection:
    """Tile mode: the diagonal, sometimes a band, other tile diagonals (some beyond the history),
    and columns anywhere, inside windows and in the queries' own tiles too."""
    num_tiles = length // tile_len
    columns, offsets = [], []
    for _ in range(heads):
        far = rng.sample(range(1, num_tiles + 3), rng.randrange(0, min(5, num_tiles + 2)))
        windows = sorted({0, *range(rng.randrange(0, 4)), *far})
        offsets.append([-w * tile_len for w in windows])
        columns.append(sorted(rng.sample(range(length), rng.randrange(0, length // 3))))
    return pack(columns, offsets, tile_len, True, device)


def any_selection(rng: random.Random, heads: int, length: int, tile_len: int,
                  device: str = "cpu") -> Selection:
    """Paper mode: diagonals at any distance, alone or in bands. Without the nearest ones some rows
    see columns alone, or nothing at all."""
    columns, offsets = [], []
    for _ in range(heads):
        position, row = -rng.randrange(0, tile_len), []
        for _ in range(rng.randrange(1, 12)):
            row.append(position)
            position -= rng.choice([1, 1, tile_len, tile_len + 1, rng.randrange(1, 3 * tile_len)])
        offsets.append(row)
        columns.append(sorted(rng.sample(range(length), rng.randrange(0, length // 3))))
    return pack(columns, offsets, tile_len, False, device)


def check(
    impl: ModuleType, case: Case, positions: Positions, start: int, selection: Selection,
    correction: bool,
) -> None:
    """One segment against the oracle: out, lse and the number of pairs."""
    cache = oracle.only_first(case, len(case.q))
    out, lse, kept = impl.sparse_prefill_attention(
        case.q[start:], cache, case.block_table, start, case.rotary, case.scale, selection,
        correction)
    expected_out, expected_lse, expected_kept = oracle.sparse(
        case, positions, start, selection, correction)
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse")
    assert float(kept) == expected_kept, "a (query, key) pair counted twice or not at all"


# positions, first query, length, query heads, KV heads; tiles and blocks of 16
TILE_SHAPES = [
    ("first-tile", PLAIN, 0, 16, 7, 1), ("one-tile-later", PLAIN, 80, 96, 5, 1),
    ("from-zero", PLAIN, 0, 112, 7, 1), ("with-history", PLAIN, 64, 160, 10, 2),
    ("equal-heads", PLAIN, 32, 128, 3, 3), ("succ", ZONED, 48, 96, 7, 1),
    ("inter", ZONED, 144, 192, 4, 1), ("mid-chunk-over-borders", ZONED, 64, 176, 7, 1),
    ("from-zero-over-borders", ZONED, 0, 112, 5, 1),
]
TILE_CASES = [pytest.param(*shape[1:], id=shape[0]) for shape in TILE_SHAPES]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("correction", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize(("positions", "start", "length", "heads", "kv_heads"), TILE_CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tile_selection_equals_oracle(
    impl: ModuleType, positions: Positions, start: int, length: int, heads: int, kv_heads: int,
    correction: bool, seed: int, device: str,
) -> None:
    rng = random.Random(SEED + seed)
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            with_means=True, shuffled=seed == 0, device=device)
    selection = tile_selection(rng, heads, length, 16, device)
    check(impl, case, positions, start, selection, correction)


@pytest.mark.parametrize("correction", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize(("positions", "start", "length", "heads", "kv_heads"), TILE_CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_listed_tiles_equal_oracle(
    impl: ModuleType, positions: Positions, start: int, length: int, heads: int, kv_heads: int,
    correction: bool, device: str,
) -> None:
    """Columns lie in listed tiles too; a piece of a segment begins inside its lists."""
    rng = random.Random(SEED)
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            with_means=True, device=device)
    selection = tile_selection(rng, heads, length, 16, device)
    selection = oracle.with_lists(rng, selection, start, length, skipped=min(2, start // 16))
    check(impl, case, positions, start, selection, correction)


# (stride, clamp) as released, 253,952 of 262,144 and 126,976 of 131,072, scaled down to tiles of 16
RELEASED = [pytest.param(Positions(2048, 64), id="253952"),
            pytest.param(Positions(1024, 32), id="126976")]


@pytest.mark.parametrize("positions", RELEASED)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_listed_tiles_of_all_zones(impl: ModuleType, positions: Positions, device: str) -> None:
    start = 2 * positions.stride + 32
    length, rng = start + 48, random.Random(SEED)
    case = oracle.make_case(length, positions, num_heads=2, with_means=True, device=device)
    selection = pack([[0, 5, positions.stride + 1, start - 40]] * 2, [[0, -16, -512]] * 2, 16, True,
                     device)
    selection = oracle.with_lists(rng, selection, start, length, most=9)
    check(impl, case, positions, start, selection, correction=True)


# tiles of 8 over blocks of 16, ragged starts and ends
ANY_SHAPES = [
    ("one-query", PLAIN, 62, 63, 7, 1), ("from-zero", PLAIN, 0, 63, 7, 1),
    ("with-history", PLAIN, 47, 111, 10, 2), ("succ", ZONED, 51, 95, 5, 1),
    ("inter", ZONED, 150, 190, 4, 1), ("over-borders", ZONED, 33, 111, 3, 3),
]
ANY_CASES = [pytest.param(*shape[1:], id=shape[0]) for shape in ANY_SHAPES]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("positions", "start", "length", "heads", "kv_heads"), ANY_CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_windows_at_any_offset_equal_oracle(
    impl: ModuleType, positions: Positions, start: int, length: int, heads: int, kv_heads: int,
    seed: int, device: str,
) -> None:
    rng = random.Random(SEED + seed)
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            shuffled=seed > 0, device=device)
    selection = any_selection(rng, heads, length, 8, device)
    check(impl, case, positions, start, selection, correction=False)


@pytest.mark.parametrize("kind", ["tile", "any"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weights_read_through_one_hot_values(impl: ModuleType, kind: str, device: str) -> None:
    """The weight of every key, read off the output: its softmax share once, or exactly 0."""
    start, length, rng = 48, 112, random.Random(SEED)
    case = oracle.make_case(length, ZONED, num_heads=5, with_means=True, device=device)
    make = tile_selection if kind == "tile" else any_selection
    selection = make(rng, 5, length, 16 if kind == "tile" else 8, device)
    seen = oracle.union(selection, start, length)
    weights = torch.cat([
        impl.sparse_prefill_attention(
            case.q[start:], _one_hot(case, first), case.block_table, start, case.rotary,
            case.scale, selection, False)[0].permute(1, 0, 2).cpu()
        for first in range(0, length, 16)], -1)  # [H, T, S]
    scores = oracle.scores(case.q[start:].cpu(), case.k,
                           oracle.distance_matrix(length, ZONED, start), case.rotary.inv_freq.cpu())
    expected = (scores * case.scale).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    assert_close(weights, expected, "weights")
    assert (weights[~seen] == 0).all(), "weight on a key outside the selection"
    assert_close(weights.sum(-1), seen.any(-1).double(), "sum of weights")


def _one_hot(case: Case, first: int) -> PagedKV:
    """Values: unit vectors on positions first ... first + D - 1, zero elsewhere."""
    values = torch.zeros_like(case.cache.v)
    for offset in range(16):
        block, slot = int(case.block_table[(first + offset) // 16]), (first + offset) % 16
        values[block, slot, :, offset] = 1.0
    return case.cache._replace(v=values)


@pytest.mark.parametrize("positions", [PLAIN, ZONED], ids=["one-zone", "three-zones"])
@pytest.mark.parametrize(
    "how", ["all-windows", "all-columns", "all-listed", "half-and-half", "unaligned"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_full_budget_equals_dense(
    impl: ModuleType, how: str, positions: Positions, device: str
) -> None:
    """Whatever covers all keys gives dense attention; the correction's terms of zero keys drop
    out, wherever they meet the mean of a tile."""
    length, start, heads = 160, 32, 7
    case = oracle.make_case(length, positions, num_heads=heads, with_means=True, device=device)
    every, tiles = list(range(length)), range(length // 16)
    columns, offsets = {
        "all-windows": ([], [-16 * w for w in tiles]),
        "all-columns": (every, [0]),
        "all-listed": (every[::9], [0, -32]),
        "half-and-half": (every, [-16 * w for w in tiles if w % 2 == 0]),
        "unaligned": (every[:7], [5 - 16 * w for w in range(length // 16 + 1)]),
    }[how]
    aligned = how != "unaligned"
    selection = pack([columns] * heads, [offsets] * heads, 16, aligned, device)
    if how == "all-listed":
        rest = [[t for t in range(tile) if t != tile - 2] for tile in tiles]
        lists = torch.tensor([row + [-1] * (10 - len(row)) for row in rest], dtype=torch.int32)
        selection = selection._replace(tiles=lists.expand(heads, -1, -1).to(device))
    out, lse, kept = impl.sparse_prefill_attention(
        case.q[start:], case.cache, case.block_table, start, case.rotary, case.scale, selection,
        aligned)
    expected_out, expected_lse = oracle.dense(case, positions, start)
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse")
    assert float(kept) == heads * (length * (length + 1) - start * (start + 1)) / 2


@pytest.mark.parametrize("columns", ["width-0", "padding-only"])
@pytest.mark.parametrize("aligned", [True, False], ids=["tile", "any"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty_columns(impl: ModuleType, aligned: bool, columns: str, device: str) -> None:
    case = oracle.make_case(96, ZONED, with_means=True, device=device)
    selection = pack([[]] * 7, [[0, -16]] * 7, 16, aligned, device)
    if columns == "padding-only":
        selection = selection._replace(columns=torch.full((7, 3), -1, device=device))
    check(impl, case, ZONED, 48, selection, correction=aligned)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_columns_only_inside_windows(impl: ModuleType, device: str) -> None:
    """Columns of the own tile, of a window, and at both edges of one: each key once."""
    case = oracle.make_case(96, PLAIN, with_means=True, device=device)
    columns = [[32, 47, 80, 95], [31, 48], [0], [64, 79], [80], [95], [33, 63]]
    selection = pack(columns, [[0, -48]] * 7, 16, True, device)
    check(impl, case, PLAIN, 80, selection, correction=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_without_any_key(impl: ModuleType, device: str) -> None:
    """A window that ends before the row and no column: out 0 and lse -inf, never NaN."""
    case = oracle.make_case(32, PLAIN, device=device)
    selection = pack([[]] * 7, [[-40]] * 7, 8, False, device)
    out, lse, kept = impl.sparse_prefill_attention(
        case.q, case.cache, case.block_table, 0, case.rotary, case.scale, selection, False)
    assert (out == 0).all() and (lse == -torch.inf).all() and float(kept) == 0


@pytest.mark.parametrize("kind", ["tile", "any"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_scores_stay_finite(impl: ModuleType, kind: str, device: str) -> None:
    """Logits of several thousand: no overflow in the merge, still the oracle's result."""
    case = oracle.make_case(96, ZONED, with_means=True, gain=60.0, device=device)
    make = tile_selection if kind == "tile" else any_selection
    selection = make(random.Random(SEED), 7, 96, 16 if kind == "tile" else 8, device)
    out, lse, _ = impl.sparse_prefill_attention(
        case.q[48:], case.cache, case.block_table, 48, case.rotary, case.scale, selection, False)
    assert lse.abs().max() > 1000
    expected_out, expected_lse, _ = oracle.sparse(case, ZONED, 48, selection, False)
    assert out.isfinite().all()
    assert_close(lse, expected_lse, "lse")
    assert error_ratio(out, expected_out) < 1e-3  # fp32 holds such logits to 1e-4 absolute


@pytest.mark.parametrize("kind", ["tile", "any"])
def test_eager_equals_reference_in_bf16(kind: str, device: str) -> None:
    case = oracle.make_case(
        160, ZONED, with_means=True, dtype=torch.bfloat16, device=device, head_dim=32)
    make = tile_selection if kind == "tile" else any_selection
    selection = make(random.Random(SEED), 7, 160, 16 if kind == "tile" else 8, device)
    out, lse, kept = _run(eager_sparse, case, selection, kind == "tile")
    expected_out, expected_lse, expected_kept = _run(reference, case, selection, kind == "tile")
    assert out.dtype == torch.bfloat16
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse", torch.bfloat16)
    assert float(kept) == float(expected_kept)


def _run(impl: ModuleType, case: Case, selection: Selection, correction: bool
         ) -> tuple[Tensor, Tensor, Tensor]:
    return impl.sparse_prefill_attention(
        case.q[48:], case.cache, case.block_table, 48, case.rotary, case.scale, selection,
        correction)


@pytest.mark.parametrize("seed", range(4))
def test_mean_correction_lowers_the_error_of_a_diffuse_head(seed: int, device: str) -> None:
    """Nearly flat attention over 2,048 keys, one window in eight kept: the output error falls at
    least threefold (about tenfold in fact), the recall's shortfall at least fivefold."""
    torch.manual_seed(SEED + seed)
    case = oracle.make_case(2048, PLAIN, num_heads=4, block_size=128, with_means=True, gain=0.5,
                            device=device)
    selection = pack([list(range(4))] * 4, [[0, -128]] * 4, 128, True, device)
    start = 1024
    dense, dense_lse = eager_dense.prefill_attention(
        case.q[start:], case.cache, case.block_table, start, case.rotary, case.scale)
    errors, shortfalls = [], []
    for correction in (False, True):
        out, lse, _ = eager_sparse.sparse_prefill_attention(
            case.q[start:], case.cache, case.block_table, start, case.rotary, case.scale,
            selection, correction)
        errors.append(error_ratio(out, dense))
        shortfalls.append(float((dense_lse - lse).abs().mean()))
    print(f"errors {errors}, shortfalls {shortfalls}")
    assert errors[1] < errors[0] / 3
    assert shortfalls[1] < shortfalls[0] / 5
