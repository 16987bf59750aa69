"""The vertical-slash kernels against the specification: out, LSE, and pairs exactly."""

from __future__ import annotations

import math
import random

import pytest
import torch

from longspan.ops import reference, vertical_slash
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
    pytest.param(PLAIN, 0, 129, 4, 1, 16, 32, id="from-zero"),
    pytest.param(PLAIN, 37, 148, 7, 1, 16, 16, id="ragged"),
    pytest.param(ZONED, 51, 95, 4, 4, 16, 16, id="succ"),
    pytest.param(ZONED, 150, 190, 8, 2, 16, 16, id="inter"),
    pytest.param(ZONED, 144, 192, 2, 1, 32, 16, id="whole-dca-chunk"),
    pytest.param(ZONED, 90, 155, 2, 1, 16, 16, id="over-borders"),
    pytest.param(Positions(416, 32), 800, 863, 2, 1, 16, 16, id="many-mean-tiles"),
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


@pytest.mark.parametrize("correction", [False, True], ids=["plain", "correction"])
@pytest.mark.parametrize("seed", range(2))
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


# windows at any offset; tiles begin at the first query
PAPER_SHAPES = [
    pytest.param(PLAIN, 62, 63, 3, 1, 16, 16, 16, id="one-query"),
    pytest.param(PLAIN, 0, 63, 7, 1, 16, 16, 16, id="from-zero"),
    pytest.param(PLAIN, 47, 111, 4, 2, 32, 32, 16, id="blocks-beyond-tiles"),
    pytest.param(ZONED, 51, 95, 2, 1, 16, 16, 16, id="succ"),
    pytest.param(ZONED, 150, 190, 4, 1, 16, 16, 16, id="inter"),
    pytest.param(ZONED, 100, 190, 2, 1, 16, 16, 32, id="tiles-beyond-blocks"),
    pytest.param(ZONED, 33, 111, 3, 3, 16, 16, 16, id="over-borders"),
]


def paper_selection(rng: random.Random, heads: int, length: int, tile_len: int, device: str,
                    ) -> Selection:
    """Disjoint windows at any offset; the first may begin inside the tile, so that some rows see
    no window, or nothing at all."""
    columns, offsets = [], []
    for _ in range(heads):
        position, row = rng.randrange(0, tile_len), []
        for _ in range(rng.randrange(1, 7)):
            row.append(position)
            position -= tile_len + rng.choice([0, 0, 1, rng.randrange(50)])
        offsets.append(torch.tensor(row))
        count = rng.randrange(0, length // 3)
        columns.append(torch.tensor(sorted(rng.sample(range(length), count)), dtype=torch.int64))
    return pack(columns, offsets, tile_len, False, device)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("positions", "start", "length", "heads", "kv_heads", "head_dim", "block_size", "tile_len"),
    PAPER_SHAPES)
def test_paper_mode_equals_reference(
    positions: Positions, start: int, length: int, heads: int, kv_heads: int, head_dim: int,
    block_size: int, tile_len: int, seed: int, kernel_device: str,
) -> None:
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            head_dim=head_dim, block_size=block_size, shuffled=seed == 0,
                            device=kernel_device)
    selection = paper_selection(random.Random(SEED + seed), heads, length, tile_len, kernel_device)
    check(case, start, selection, correction=False)
