"""The vertical-slash kernels against the specification: out, LSE, and pairs exactly."""

from __future__ import annotations

import math
import random

import pytest
import torch

from longspan.ops import reference
from longspan.ops.sparse import triton as vertical_slash
from longspan.ops.sparse import triton_unaligned
from longspan.ops.types import Selection
from tests.conftest import SEED, assert_close
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

PLAIN = Positions(4096, 96)
ZONED = Positions(64, 16)  # stride 48: three tiles of 16 in a DCA chunk
# positions, first query, length, query heads, KV heads, head dim, tile length
TILE_SHAPES = [
    pytest.param(PLAIN, 0, 1, 1, 1, 16, 16, id="one-token"),
    pytest.param(PLAIN, 62, 63, 7, 1, 16, 16, id="one-query"),
    pytest.param(PLAIN, 0, 129, 2, 1, 16, 32, id="from-zero"),
    pytest.param(PLAIN, 69, 111, 4, 1, 16, 16, id="ragged"),
    pytest.param(PLAIN, 300, 333, 3, 1, 16, 32, id="late"),
    pytest.param(ZONED, 51, 95, 3, 3, 16, 16, id="succ"),
    pytest.param(ZONED, 165, 190, 4, 2, 16, 16, id="inter"),
    pytest.param(ZONED, 144, 192, 2, 1, 32, 16, id="whole-dca-chunk"),
    pytest.param(ZONED, 130, 155, 2, 1, 16, 16, id="over-borders"),
    pytest.param(Positions(416, 32), 800, 831, 2, 1, 16, 16, id="many-mean-tiles"),
]


def tile_selection(rng: random.Random, heads: int, length: int, tile_len: int, device: str,
                   ) -> Selection:
    """Budgets that differ between heads; windows beyond the history; one head without columns."""
    num_tiles = -(-length // tile_len)
    columns, offsets = [], []
    for head in range(heads):
        count = 0 if head == 1 else rng.randrange(0, length // 2 + 1)
        columns.append(torch.tensor(sorted(rng.sample(range(length), count)), dtype=torch.int64))
        far = rng.sample(range(1, num_tiles + 3), rng.randrange(0, min(6, num_tiles + 2)))
        gaps = sorted({0, *range(rng.randrange(0, 4)), *far})
        offsets.append(torch.tensor([-gap * tile_len for gap in gaps]))
    return pack(columns, offsets, tile_len, True, device)


def pack(columns: list[torch.Tensor], offsets: list[torch.Tensor], tile_len: int, aligned: bool,
         device: str) -> Selection:
    pad = torch.nn.utils.rnn.pad_sequence
    return Selection(
        pad(columns, batch_first=True, padding_value=-1).to(device),
        pad(offsets, batch_first=True, padding_value=tile_len).to(device), tile_len, aligned,
        tuple(len(row) for row in columns))


def check(case: Case, start: int, selection: Selection, correction: bool) -> None:
    dtype = case.q.dtype
    args = (case.q[start:], oracle.only_first(case, len(case.q)), case.block_table, start,
            case.rotary, case.scale, selection, correction)
    out, lse, kept = vertical_slash.sparse_prefill_attention(*args)
    expected_out, expected_lse, expected_kept = reference.sparse_prefill_attention(*args)
    assert out.dtype == dtype and lse.dtype == torch.float32 and kept.dtype == torch.float64
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse", dtype)
    assert float(kept) == float(expected_kept), "a pair counted twice or not at all"


@pytest.mark.parametrize(
    ("seed", "correction"), [(0, False), (1, True)], ids=["plain", "correction"])
@pytest.mark.parametrize(
    ("positions", "start", "length", "heads", "kv_heads", "head_dim", "tile_len"), TILE_SHAPES)
def test_tile_mode_equals_reference(
    positions: Positions, start: int, length: int, heads: int, kv_heads: int, head_dim: int,
    tile_len: int, seed: int, correction: bool, kernel_device: str,
) -> None:
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            head_dim=head_dim, block_size=tile_len, with_means=True,
                            device=kernel_device)
    rng = random.Random(SEED + seed)
    selection = tile_selection(rng, heads, length, tile_len, kernel_device)
    check(case, start, selection, correction)


@pytest.mark.parametrize("correction", [False, True], ids=["plain", "correction"])
@pytest.mark.parametrize(
    ("positions", "start", "length", "heads", "kv_heads", "head_dim", "tile_len"), TILE_SHAPES)
def test_listed_tiles_equal_reference(
    positions: Positions, start: int, length: int, heads: int, kv_heads: int, head_dim: int,
    tile_len: int, correction: bool, kernel_device: str,
) -> None:
    """Also where columns lie in listed tiles, and a piece of a segment begins inside its lists."""
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            head_dim=head_dim, block_size=tile_len, with_means=True,
                            device=kernel_device)
    rng = random.Random(SEED)
    selection = tile_selection(rng, heads, length, tile_len, kernel_device)
    skipped = min(1, start // tile_len)
    check(case, start, oracle.with_lists(rng, selection, start, length, 5, skipped), correction)


# (stride, clamp) as released, 253,952 of 262,144 and 126,976 of 131,072, scaled down to tiles of 16
@pytest.mark.parametrize("positions", [Positions(2048, 64), Positions(1024, 32)], ids=str)
def test_listed_tiles_of_all_zones(positions: Positions, kernel_device: str) -> None:
    start = 2 * positions.stride + 32
    length = start + 16
    case = oracle.make_case(length, positions, num_heads=2, with_means=True, device=kernel_device)
    columns = torch.tensor([0, 5, positions.stride + 1, start - 40])
    selection = pack([columns] * 2, [torch.tensor([0, -16, -512])] * 2, 16, True, kernel_device)
    check(case, start, oracle.with_lists(random.Random(SEED), selection, start, length, 9), True)


# windows at any offset; tiles begin at the first query
PAPER_SHAPES = [
    pytest.param(PLAIN, 62, 63, 3, 1, 16, 16, 16, id="one-query"),
    pytest.param(PLAIN, 0, 63, 3, 1, 16, 16, 16, id="from-zero"),
    pytest.param(PLAIN, 61, 111, 4, 2, 32, 32, 16, id="blocks-beyond-tiles"),
    pytest.param(ZONED, 51, 95, 2, 1, 16, 16, 16, id="succ"),
    pytest.param(ZONED, 160, 190, 2, 1, 16, 16, 16, id="inter"),
    pytest.param(ZONED, 100, 190, 2, 1, 16, 16, 32, id="tiles-beyond-blocks"),
    pytest.param(ZONED, 60, 111, 2, 2, 16, 16, 16, id="over-borders"),
]


def paper_selection(rng: random.Random, heads: int, length: int, tile_len: int, device: str,
                    ) -> Selection:
    """Diagonals at any distance, alone or in bands. Without the nearest ones some rows see no
    window, or nothing at all."""
    columns, offsets = [], []
    for _ in range(heads):
        position, row = -rng.randrange(0, tile_len), []
        for _ in range(rng.randrange(1, 12)):
            row.append(position)
            position -= rng.choice([1, 1, tile_len, tile_len + 1, rng.randrange(1, 3 * tile_len)])
        offsets.append(torch.tensor(row))
        count = rng.randrange(0, length // 3)
        columns.append(torch.tensor(sorted(rng.sample(range(length), count)), dtype=torch.int64))
    return pack(columns, offsets, tile_len, False, device)


@pytest.mark.parametrize(
    ("positions", "start", "length", "heads", "kv_heads", "head_dim", "block_size", "tile_len"),
    PAPER_SHAPES)
def test_paper_mode_equals_reference(
    positions: Positions, start: int, length: int, heads: int, kv_heads: int, head_dim: int,
    block_size: int, tile_len: int, kernel_device: str,
) -> None:
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            head_dim=head_dim, block_size=block_size, device=kernel_device)
    selection = paper_selection(random.Random(SEED), heads, length, tile_len, kernel_device)
    check(case, start, selection, correction=False)


def test_paper_mode_takes_as_many_tiles_as_the_workspace_holds(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query tile at a time gives the same as all at once, over DCA borders too."""
    case = oracle.make_case(111, ZONED, num_heads=2, device=kernel_device)
    selection = paper_selection(random.Random(SEED), 2, 111, 16, kernel_device)
    args = (case.q[20:], case.cache, case.block_table, 20, case.rotary, case.scale, selection,
            False)
    whole = vertical_slash.sparse_prefill_attention(*args)
    monkeypatch.setattr(triton_unaligned, "WORKSPACE_BYTES", 1)
    for one, other in zip(whole, vertical_slash.sparse_prefill_attention(*args), strict=True):
        assert torch.equal(one, other)



@pytest.mark.parametrize(
    "how", ["all-windows", "all-columns", "all-listed", "half-and-half", "unaligned"])
def test_full_budget_equals_dense(how: str, kernel_device: str) -> None:
    """Whatever covers all keys gives dense attention; mean terms of zero keys drop out."""
    length, start, heads = 160, 128, 2
    case = oracle.make_case(length, ZONED, num_heads=heads, with_means=True, device=kernel_device)
    every, tiles = list(range(length)), range(length // 16)
    columns, offsets = {
        "all-windows": ([], [-16 * w for w in tiles]),
        "all-columns": (every, [0]),
        "all-listed": (every[::9], [0, -32]),
        "half-and-half": (every, [-16 * w for w in tiles if w % 2 == 0]),
        "unaligned": (every[:7], [5 - 16 * w for w in range(length // 16 + 1)]),
    }[how]
    aligned = how != "unaligned"
    selection = pack([torch.tensor(columns, dtype=torch.int64)] * heads,
                     [torch.tensor(offsets)] * heads, 16, aligned, kernel_device)
    if how == "all-listed":
        rest = [[t for t in range(tile) if t != tile - 2] for tile in tiles]
        lists = torch.tensor([row + [-1] * (10 - len(row)) for row in rest], dtype=torch.int32)
        selection = selection._replace(tiles=lists.expand(heads, -1, -1).to(kernel_device))
    out, lse, kept = vertical_slash.sparse_prefill_attention(
        case.q[start:], case.cache, case.block_table, start, case.rotary, case.scale, selection,
        aligned)
    expected_out, expected_lse = reference.prefill_attention(
        case.q[start:], case.cache, case.block_table, start, case.rotary, case.scale)
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse")
    assert float(kept) == heads * (length * (length + 1) - start * (start + 1)) / 2


@pytest.mark.parametrize("columns", ["width-0", "padding-only"])
@pytest.mark.parametrize("aligned", [True, False], ids=["tile", "paper"])
def test_empty_columns(aligned: bool, columns: str, kernel_device: str) -> None:
    """Without the host's bound, too: then every head may hold the padded width."""
    case = oracle.make_case(96, ZONED, num_heads=2, with_means=True, device=kernel_device)
    none = torch.zeros(0, dtype=torch.int64)
    selection = pack([none] * 2, [torch.tensor([0, -16])] * 2, 16, aligned, kernel_device)
    selection = selection._replace(max_columns=None)
    if columns == "padding-only":
        selection = selection._replace(columns=torch.full((2, 3), -1, device=kernel_device))
    check(case, 48, selection, correction=aligned)


def test_columns_only_inside_windows(kernel_device: str) -> None:
    """Columns of the own tile, of a window, and at both edges of one: each key once."""
    case = oracle.make_case(96, PLAIN, num_heads=3, with_means=True, device=kernel_device)
    columns = [torch.tensor(row) for row in ([32, 47, 80, 95], [31, 48, 64, 79], [33, 63])]
    selection = pack(columns, [torch.tensor([0, -48])] * 3, 16, True, kernel_device)
    check(case, 80, selection, correction=True)


def test_rows_without_any_key(kernel_device: str) -> None:
    """A window that ends before the row and no column: out 0 and lse -inf, never NaN."""
    case = oracle.make_case(32, PLAIN, num_heads=2, device=kernel_device)
    none = torch.zeros(0, dtype=torch.int64)
    selection = pack([none] * 2, [torch.tensor([-60])] * 2, 16, False, kernel_device)
    out, lse, kept = vertical_slash.sparse_prefill_attention(
        case.q, case.cache, case.block_table, 0, case.rotary, case.scale, selection, False)
    assert (out == 0).all() and (lse == -math.inf).all() and float(kept) == 0


@pytest.mark.parametrize("kind", ["tile", "paper"])
@pytest.mark.parametrize("gain", [1.5, 60.0], ids=["usual", "large-scores"])
def test_bf16_equals_reference(kind: str, gain: float, kernel_device: str) -> None:
    case = oracle.make_case(112, ZONED, num_heads=2, with_means=True, dtype=torch.bfloat16,
                            head_dim=32, gain=gain, device=kernel_device)
    make = tile_selection if kind == "tile" else paper_selection
    selection = make(random.Random(SEED), 2, 112, 16, kernel_device)
    args = (case.q[48:], case.cache, case.block_table, 48, case.rotary, case.scale, selection,
            kind == "tile")
    out, lse, _ = vertical_slash.sparse_prefill_attention(*args)
    expected_out, expected_lse, _ = reference.sparse_prefill_attention(*args)
    assert out.isfinite().all()
    assert_close(lse, expected_lse, "lse", torch.bfloat16)
    if gain < 10:  # bf16 queries hold logits of thousands to 10 absolute
        assert_close(out, expected_out, "out")
