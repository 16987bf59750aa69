"""A segment's selection made ready, against its definition restated row by row."""

from __future__ import annotations

import math
import random

import pytest
import torch

from longspan.ops import reference
from longspan.ops.sparse.layout import NO_TILE, SparseWork, prepare
from longspan.ops.types import PagedKV, Selection
from tests.conftest import SEED
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

PLAIN = Positions(4096, 96)
ZONED = Positions(64, 16)  # stride 48: three tiles of 16 in a DCA chunk
# positions, first query, length, query heads, KV heads, tile length
SHAPES = [
    pytest.param(PLAIN, 0, 1, 1, 1, 16, id="one-token"),
    pytest.param(PLAIN, 37, 300, 7, 1, 16, id="one-zone"),
    pytest.param(ZONED, 51, 95, 5, 1, 16, id="succ"),
    pytest.param(ZONED, 150, 190, 8, 2, 16, id="inter"),
    pytest.param(Positions(800, 32), 1600, 2063, 3, 3, 16, id="many-mean-tiles"),
    pytest.param(Positions(100, 4), 192, 280, 4, 1, 32, id="tile-32"),
]


def make_selection(rng: random.Random, heads: int, length: int, tile_len: int, device: str,
                   density: float = 0.3) -> Selection:
    """Tile mode; budgets differ between heads, some columns and windows beyond the history."""
    columns, offsets = [], []
    for head in range(heads):
        num_tiles = -(-length // tile_len)
        count = 0 if head == 1 else rng.randrange(0, max(1, int(length * density)))
        columns.append(torch.tensor(sorted(rng.sample(range(length), count)), dtype=torch.int64))
        far = rng.sample(range(1, num_tiles + 3), rng.randrange(0, min(9, num_tiles + 2)))
        gaps = sorted({0, *range(rng.randrange(0, 3)), *far})
        offsets.append(torch.tensor([-gap * tile_len for gap in gaps]))
    pad = torch.nn.utils.rnn.pad_sequence
    return Selection(
        pad(columns, batch_first=True, padding_value=-1).to(device),
        pad(offsets, batch_first=True, padding_value=tile_len).to(device), tile_len, True,
        tuple(len(row) for row in columns))


def check_columns(work: SparseWork, case: Case, selection: Selection, head: int, stop: int) -> None:
    """Rows of one head: each zone's columns in order, then padding up to a whole tile."""
    tile_len, group = selection.tile_len, case.q.shape[1] // case.k.shape[1]
    k, v = reference.gather_kv(case.cache, case.block_table, len(case.q))
    bounds = [0, *(border * tile_len for border in work.borders), (stop - 1) // tile_len * tile_len]
    parts = work.column_tiles[head].tolist()
    for part in range(3):
        wanted = [c for c in selection.columns[head].tolist()
                  if max(bounds[part], 0) <= c < bounds[part + 1]]
        rows = slice(parts[part] * tile_len, parts[part + 1] * tile_len)
        count = len(wanted)
        assert parts[part + 1] - parts[part] == -(-count // tile_len)
        assert work.col_tile[rows].tolist() == (
            [c // tile_len for c in wanted] + [NO_TILE] * (rows.stop - rows.start - count))
        for gathered, source in ((work.k_cols, k), (work.v_cols, v)):
            assert torch.equal(gathered[rows][:count], source[wanted, head // group])
            assert (gathered[rows][count:] == 0).all()


def check_means(work: SparseWork, cache: PagedKV, case: Case, selection: Selection, head: int,
                stop: int) -> None:
    tile_len, group = selection.tile_len, case.q.shape[1] // case.k.shape[1]
    assert cache.k_mean is not None and cache.v_mean is not None
    columns = [c for c in selection.columns[head].tolist() if c >= 0]
    num_near, num_far = work.mean_counts
    runs = [range(work.first_mean + i, work.first_mean + i + 1) for i in range(num_near)]
    runs += [range(8 * i, 8 * i + 8) for i in range(num_far)]
    last_tile = (stop - 1) // tile_len
    assert work.first_mean + num_near == last_tile
    if selection.near_tiles is not None:
        assert 8 * num_far == max(0, last_tile - selection.near_tiles) // 8 * 8
    for gathered, source in ((work.k_means, cache.k_mean), (work.v_means, cache.v_mean)):
        kept = gathered[:, head // group]
        expected = [source[case.block_table[list(run)], head // group].float().mean(0)
                    for run in runs]
        if runs:
            torch.testing.assert_close(kept[: len(runs)].float(), torch.stack(expected))
        assert (kept[len(runs) :] == 0).all() and len(kept) >= len(runs) + tile_len
    free = [tile_len - sum(c // tile_len in run for c in columns) / len(run) for run in runs]
    biases = [math.log2(n) if n else -math.inf for n in free]
    biases += [-math.inf] * (len(work.k_means) - len(runs))
    torch.testing.assert_close(work.mean_bias[head].cpu(), torch.tensor(biases))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("positions", "start", "length", "heads", "kv_heads", "tile_len"), SHAPES)
def test_work_equals_its_definition(
    positions: Positions, start: int, length: int, heads: int, kv_heads: int, tile_len: int,
    seed: int, kernel_device: str,
) -> None:
    rng = random.Random(SEED + seed)
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            block_size=tile_len, with_means=True, device=kernel_device)
    selection = make_selection(rng, heads, length, tile_len, kernel_device)
    selection = oracle.with_lists(rng, selection, start, length, 5, min(1, start // tile_len))
    if positions.stride % (8 * tile_len) == 0:
        selection = selection._replace(near_tiles=(None, 0, 3)[seed])
    work = prepare(selection, case.cache, case.block_table, start, length, positions.stride,
                   correction=True)
    num_tiles = -(-length // tile_len)
    assert work.lists is not None
    for head, rows in enumerate(work.lists.tiles.tolist()):
        for row, listed in enumerate(rows):
            tiles = [tile for tile in listed if tile >= 0]
            assert set(tiles) == oracle.listed(selection, head, start + row * tile_len)
            assert work.lists.ends[head, row].tolist() == [
                sum(tile < end for tile in tiles) for end in (*work.borders, num_tiles)]
            words = work.lists.bits[head, row].tolist()
            assert [t for t in range(32 * len(words)) if words[t // 32] >> t % 32 & 1] == tiles
    cost = []
    for head in range(heads):
        gaps = [-o // tile_len for o in selection.offsets[head].tolist() if o != tile_len]
        assert work.windows[head, : len(gaps)].tolist() == gaps
        assert (work.windows[head, len(gaps) :] == NO_TILE).all()
        assert work.window_rank[head].tolist() == [
            sum(gap < g for gap in gaps) for g in range(num_tiles + 1)]
        assert work.window_flag[head].tolist() == [int(g in gaps) for g in range(num_tiles)]
        columns = [c for c in selection.columns[head].tolist() if c >= 0]
        assert work.column_rank[head].tolist() == [
            sum(c < i * tile_len for c in columns) for i in range(num_tiles + 1)]
        check_columns(work, case, selection, head, length)
        check_means(work, case.cache, case, selection, head, length)
        num_column_tiles = int(work.column_tiles[head, 3] - work.column_tiles[head, 0])
        cost.append(num_column_tiles + sum(gap < num_tiles for gap in gaps))
    order = work.head_order.tolist()
    assert sorted(order) == list(range(heads))
    assert [cost[head] for head in order] == sorted(cost, reverse=True)
    queries = torch.arange(start, length, device=kernel_device)
    assert float(work.kept) == float(reference.kept_pairs(selection, queries, length).sum())


@pytest.mark.parametrize("max_columns", [None, (3, 3)])
def test_no_column_at_all(max_columns: tuple[int, ...] | None, kernel_device: str) -> None:
    """Width 0, and padding only; without the correction nothing is gathered."""
    case = oracle.make_case(95, ZONED, num_heads=2, device=kernel_device)
    for width in (0, 3):
        columns = torch.full((2, width), -1, device=kernel_device)
        offsets = torch.tensor([[0, 16], [0, -16]], device=kernel_device)
        selection = Selection(columns, offsets, 16, True, max_columns if width else None)
        work = prepare(selection, case.cache, case.block_table, 51, 95, 48, correction=False)
        assert work.column_tiles.eq(0).all() and work.k_means.numel() == 0
        assert work.lists is None
        queries = torch.arange(51, 95, device=kernel_device)
        assert float(work.kept) == float(reference.kept_pairs(selection, queries, 95).sum())
