"""Selection against a slow independent restatement of both modes, and on planted structure."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longspan.ops import reference
from longspan.ops.select.eager import select_vertical_slash
from longspan.ops.select.probes import PAPER_TILE_LEN, place_probes
from longspan.ops.sparse.eager_unaligned import window_starts
from longspan.ops.types import Budget, Selection
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

PLAIN = Positions(4096, 96)
ZONED = Positions(128, 32)  # stride 96: six tiles of 16
TILE = 16


def budget(mode: str, vertical: list[int], slash: list[int], **changes: int) -> Budget:
    policy = {"probe_last": 64, "probe_strided": 64 if mode == "tile" else 0,
              "sink": 4 if mode == "tile" else 30, "local": 20 if mode == "tile" else 100}
    return Budget(vertical=tuple(vertical), slash=tuple(slash), mode=mode, **(policy | changes))


def run(case: Case, start: int, limits: Budget) -> Selection:
    return select_vertical_slash(
        case.q[start:], oracle.only_first(case, len(case.q)), case.block_table, start, case.rotary,
        case.scale, limits)


def columns_of(selection: Selection, head: int) -> list[int]:
    return [column for column in selection.columns[head].tolist() if column != -1]


def offsets_of(selection: Selection, head: int) -> list[int]:
    return [o for o in selection.offsets[head].tolist() if o != selection.tile_len]


# -- the slow restatement ---------------------------------------------------------------------


def probe_mass(case: Case, positions: Positions, head: int, rows: list[int]) -> Tensor:
    """Attention of single rows at continuous positions, fp64, [rows, L]."""
    stride, length = positions.stride, len(case.k)
    added = (0, stride, positions.chunk_size)
    distances = torch.tensor([
        [row % stride + added[min(2, row // stride - key // stride)] - key % stride
         if key <= row else 0 for key in range(length)] for row in rows])
    kv_head = head // (case.q.shape[1] // case.k.shape[1])
    logits = oracle.scores(case.q[rows, head : head + 1].cpu(), case.k[:, kv_head : kv_head + 1],
                           distances, case.rotary.inv_freq.cpu())[0] * case.scale
    future = torch.arange(length)[None] > torch.tensor(rows)[:, None]
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def top(sums: list[float], count: int, forced: int) -> list[int]:
    """The first ``forced`` entries, then the largest; ascending."""
    order = sorted(range(len(sums)), key=lambda i: (-1, i) if i < forced else (0, -sums[i]))
    return sorted(order[:count])


def diagonal_sums(mass: Tensor, rows: list[int]) -> list[float]:
    """Mass by distance, with explicit loops."""
    sums = [0.0] * (max(rows) + 1)
    for weights, row in zip(mass.tolist(), rows, strict=True):
        for key in range(row + 1):
            sums[row - key] += weights[key]
    return sums


def restride_sums(mass: Tensor) -> Tensor:
    """MInference's diagonal sums of consecutive rows: zero-pad, re-stride, add up. Entry j is the
    diagonal through key j of the last row; partial diagonals at the upper right are dropped."""
    rows, length = mass.shape
    zeros = torch.zeros(rows, rows, dtype=mass.dtype)
    padded = torch.cat((zeros, mass, zeros), 1)
    skewed = padded.as_strided((rows, rows + length), (2 * rows + length + 1, 1))
    return skewed.sum(0)[1 : length + 1]


# -- paper mode -------------------------------------------------------------------------------

PAPER_CASES = [
    pytest.param(PLAIN, 0, 257, id="from-zero"), pytest.param(PLAIN, 190, 401, id="with-history"),
    pytest.param(PLAIN, 300, 333, id="fewer-rows-than-probes"),
    pytest.param(Positions(256, 56), 230, 379, id="succ"),
    pytest.param(Positions(128, 32), 290, 383, id="inter"),
]


@pytest.mark.parametrize(("positions", "start", "length"), PAPER_CASES)
def test_paper_mode_equals_minference_rules(
    positions: Positions, start: int, length: int, device: str
) -> None:
    """Seven heads with the same keys and budgets from the forced entries to everything: the order
    of columns and of diagonals is that of the public rules."""
    vertical, slash = [30, 31, 40, 77, 130, 200, 999], [100, 101, 110, 130, 160, 222, 999]
    queries = torch.arange(start, length, device=device)
    case = oracle.make_case(length, positions, head_dim=32, gain=1.2, device=device)
    selection = run(case, start, budget("paper", vertical, slash))
    assert selection.tile_len == PAPER_TILE_LEN and not selection.aligned
    rows = list(range(max(start, length - 64), length))
    kept = reference.kept_pairs(selection, queries, length).cpu()
    for head in range(7):
        mass = probe_mass(case, positions, head, rows)
        restrided = restride_sums(mass).flip(0)  # by distance from the last row
        assert torch.allclose(restrided, torch.tensor(diagonal_sums(mass, rows)).double())
        columns = top(mass.sum(0).tolist(), vertical[head], forced=30)
        distances = top(restrided.tolist(), slash[head], forced=100)
        assert columns_of(selection, head) == columns, f"columns of head {head}"
        assert offsets_of(selection, head) == [-d for d in distances], f"head {head}"
        assert torch.equal(kept[head], minference_pairs(columns, distances, start, length)), head


def test_paper_mode_forces_sinks_and_local_diagonals(device: str) -> None:
    """A budget of exactly the forced entries holds nothing else, a smaller one the first ones."""
    case = oracle.make_case(300, PLAIN, num_heads=2, device=device)
    selection = run(case, 0, budget("paper", [30, 7], [100, 50]))
    assert columns_of(selection, 0) == list(range(30))
    assert columns_of(selection, 1) == list(range(7))
    covered = [covered_distances(selection, head) for head in range(2)]
    assert set(range(100)) <= covered[0]
    assert set(range(50)) <= covered[1]


def minference_pairs(columns: list[int], distances: list[int], start: int, length: int) -> Tensor:
    """Which keys each query sees by the public index and its attention kernel, [T, L] bool: blocks
    and single columns of its tile, up to itself."""
    seen = torch.zeros(length - start, length, dtype=torch.bool)
    for first in range(start, length, PAPER_TILE_LEN):
        blocks, singles = oracle.minference_sweep(columns, distances, first, PAPER_TILE_LEN)
        keys = [key for block in blocks for key in range(block, block + PAPER_TILE_LEN)] + singles
        tile = slice(first - start, first - start + PAPER_TILE_LEN)
        seen[tile, [key for key in keys if key < length]] = True
    return seen & oracle.causal(length, start)


def covered_distances(selection: Selection, head: int) -> set[int]:
    """Distances of the head's diagonals."""
    return {-offset for offset in offsets_of(selection, head)}


@given(st.sets(st.integers(0, 700), min_size=1, max_size=60), st.sampled_from([8, 16, 64]),
       st.sets(st.integers(0, 799), max_size=40), st.integers(0, 800))
def test_windows_equal_the_serial_sweep(
    distances: set[int], tile_len: int, columns: set[int], tile_start: int
) -> None:
    """The same blocks as the public kernel, disjoint, at the prompt's start as far from it, and
    what each diagonal has of the tile's keys is covered."""
    distances |= set(range(100))  # the local band that the policy forces
    offsets = [-d for d in sorted(distances)]
    windows = reference.paper_windows(offsets, tile_start, tile_len)
    blocks, singles = oracle.minference_sweep(
        sorted(columns), sorted(distances), tile_start, tile_len)
    assert windows == blocks and blocks[0] >= 0
    assert all(high - low >= tile_len for low, high in zip(blocks, blocks[1:], strict=False))
    keys = {block + i for block in blocks for i in range(tile_len)}
    for distance in distances:
        assert {tile_start - distance + i for i in range(max(0, distance - tile_start), tile_len)
                } <= keys
    end = tile_start + tile_len
    assert [c for c in singles if c < end] == sorted(c for c in columns - keys if c < end)
    every = window_starts(torch.tensor([tile_start, 0, 5000]), torch.tensor(offsets), tile_len)
    assert [start for start in every[0].tolist() if start < 1 << 30] == windows


# -- tile mode --------------------------------------------------------------------------------


def tile_probes(start: int, length: int, last: int, strided: int) -> list[int]:
    """Rows spread over the last tile, and over all before it so that they stand at as many places
    of a tile as possible."""
    count = length - start
    last = min(last, count)
    apart = TILE // last if last < TILE and last * (TILE // last) <= count else 1
    at_end = [length - 1 - apart * i for i in range(last)]
    rest = min(at_end) - start
    strided = min(strided, rest)
    step = rest // strided if strided else 1
    if step > TILE:
        while (step + max(1, TILE // strided)) % TILE:
            step -= 1
    first = start + (rest - step * (strided - 1)) // 2
    return at_end[::-1] + [first + step * i for i in range(strided)]


def tile_choice(
    case: Case, positions: Positions, head: int, start: int, limits: Budget
) -> tuple[list[int], list[int]]:
    """Columns and tile diagonals by the rules of tile mode, with explicit loops."""
    length = len(case.k)
    rows = tile_probes(start, length, limits.probe_last, limits.probe_strided)
    mass = probe_mass(case, positions, head, rows).tolist()
    num_tiles = -(-length // TILE)
    sums = [0.0] * num_tiles
    for weights, row in zip(mass, rows, strict=True):
        for key in range(limits.sink, row + 1):  # sinks never count as diagonals
            sums[row // TILE - key // TILE] += weights[key]
    forced = 1 + -(-limits.local // TILE)
    windows = top(sums, max(forced, -(-limits.slash[head] // TILE)), forced)
    by_tile, column_sums = [0.0] * num_tiles, [0.0] * length
    for weights, row in zip(mass, rows, strict=True):
        for key in range(limits.sink, row + 1):
            if row // TILE - key // TILE not in windows:
                column_sums[key] += weights[key]
                by_tile[key // TILE] += weights[key]
    tiles = top(by_tile, limits.vertical[head], -(-limits.sink // TILE))
    # keys of other tiles rank last
    ranked = [total if key // TILE in tiles else -1.0 for key, total in enumerate(column_sums)]
    return top(ranked, limits.vertical[head], limits.sink), windows


def test_probes_stand_at_all_places_of_a_tile() -> None:
    """At real sizes: every second place twice over, every place for one probe more."""
    for num_queries in (32_768, 16_384, 9_000, 30_720):
        for counts in ((64, 64), (64, 0), (32, 32), (128, 0)):
            limits = Budget((1,), (1,), "tile", *counts, 4, 100)
            for probe in place_probes(777, num_queries, 128, limits):
                rows = probe.positions(torch.device("cpu"))
                places, last = rows % 128, int(rows[-1])
                assert len(places.unique()) == probe.num_rows
                assert (places.sort().values.diff() == 128 // probe.num_rows).all()
                assert 777 <= probe.first <= last < 777 + num_queries
            spread = last - probe.first
            assert not counts[1] or spread > 0.7 * num_queries


TILE_CASES = [
    pytest.param(PLAIN, 0, 256, id="from-zero"), pytest.param(PLAIN, 160, 400, id="with-history"),
    pytest.param(PLAIN, 320, 336, id="one-tile"), pytest.param(ZONED, 96, 192, id="succ"),
    pytest.param(ZONED, 304, 368, id="inter-mid-chunk"),
]


@pytest.mark.parametrize("strided", [0, 7, 64], ids=lambda n: f"strided{n}")
@pytest.mark.parametrize(("positions", "start", "length"), TILE_CASES)
def test_tile_mode_equals_slow_restatement(
    positions: Positions, start: int, length: int, strided: int, device: str
) -> None:
    """Five heads of one KV head, budgets from nothing to more than there is."""
    case = oracle.make_case(length, positions, num_heads=5, head_dim=32, gain=1.2,
                            with_means=True, device=device)
    limits = budget("tile", [0, 3, 17, 40, 60], [0, 60, 80, 112, 9999], probe_strided=strided)
    selection = run(case, start, limits)
    assert selection.tile_len == TILE and selection.aligned
    for head in range(5):
        columns, windows = tile_choice(case, positions, head, start, limits)
        assert offsets_of(selection, head) == [-TILE * w for w in windows], f"head {head}"
        if limits.slash[head] < 9999:  # with all tiles bought no column is better than another
            assert columns_of(selection, head) == columns, f"head {head}"


@pytest.mark.parametrize("mode", ["tile", "paper"])
@pytest.mark.parametrize("seed", range(3))
def test_selection_is_well_formed(mode: str, seed: int, device: str) -> None:
    """Ascending columns inside the context, descending windows that are disjoint in tile mode,
    padding at the end."""
    rng = random.Random(seed)
    start, length = TILE * rng.randrange(10), 0
    length = start + TILE * rng.randrange(1, 12)
    case = oracle.make_case(length, PLAIN, num_heads=10, num_kv_heads=2, device=device)
    limits = budget(mode, [rng.randrange(300) for _ in range(10)],
                    [rng.randrange(300) for _ in range(10)])
    selection = run(case, start, limits)
    for head in range(10):
        columns, offsets = columns_of(selection, head), offsets_of(selection, head)
        assert selection.columns[head].tolist()[: len(columns)] == columns
        assert columns == sorted(set(columns)) and all(0 <= c < length for c in columns)
        assert len(columns) == min(length, limits.vertical[head])
        assert selection.offsets[head].tolist()[: len(offsets)] == offsets
        apart = selection.tile_len if mode == "tile" else 1
        assert all(a - b >= apart for a, b in zip(offsets, offsets[1:], strict=False))
        assert offsets[0] < selection.tile_len
        if mode == "tile":
            assert offsets[0] == 0 and all(offset % TILE == 0 for offset in offsets)


# -- planted structure ------------------------------------------------------------------------

LENGTH, START, DIM = 384, 128, 32


def turned(x: Tensor, angle_steps: int, inv_freq: Tensor) -> Tensor:
    """x [T, H, D] rotated by ``angle_steps`` positions."""
    angles = (angle_steps * inv_freq.double()).expand(len(x), -1)
    return oracle.rotate_pair(x, angles).float()


def planted_column(column: int, rows: range, device: str, positions: Positions = PLAIN) -> Case:
    """All ``rows`` look for one direction of the slowest rotation, which one key holds."""
    q, k = 0.5 * torch.randn(LENGTH, 1, DIM), 0.5 * torch.randn(LENGTH, 1, DIM)
    k[column, 0, DIM // 2 - 1] = 8.0
    q[rows.start : rows.stop, 0, DIM // 2 - 1] = 8.0
    return oracle.make_case(LENGTH, positions, q=q, k=k, with_means=True, device=device)


def planted_diagonal(distance: int, device: str, positions: Positions = PLAIN) -> Case:
    """Each query is the key ``distance`` before it, turned so that RoPE brings them together."""
    inv_freq = oracle.tables(DIM, positions, LENGTH).inv_freq
    k = torch.randn(LENGTH, 1, DIM)
    q = 0.5 * torch.randn(LENGTH, 1, DIM)
    q[distance:] = 2 * turned(k, -distance, inv_freq)[: LENGTH - distance]
    return oracle.make_case(LENGTH, positions, q=q, k=k, with_means=True, device=device)


@pytest.mark.parametrize("mode", ["tile", "paper"])
@pytest.mark.parametrize("column", [31, 57, 100, 140])
def test_strong_column_is_found(mode: str, column: int, device: str) -> None:
    case = planted_column(column, range(LENGTH), device)
    forced = 4 if mode == "tile" else 30
    selection = run(case, START, budget(mode, [forced + 2], [100]))
    assert column in columns_of(selection, 0)


@pytest.mark.parametrize("distance", [130, 144, 201, 250])
@pytest.mark.parametrize("mode", ["tile", "paper"])
def test_strong_diagonal_is_found(mode: str, distance: int, device: str) -> None:
    """Tile mode buys the tile diagonals that hold the distance, paper mode its whole window."""
    case = planted_diagonal(distance, device)
    selection = run(case, START, budget(mode, [30], [101] if mode == "paper" else [5 * TILE]))
    check_covered(selection, mode, distance)


@pytest.mark.parametrize("mode", ["tile", "paper"])
def test_diagonal_is_found_across_a_dca_border(mode: str, device: str) -> None:
    """Keys of the chunk before, at distances that DCA's clamped positions no longer tell apart:
    continuous positions do."""
    positions, distance = Positions(232, 40), 230  # stride 192
    case = planted_diagonal(distance, device, positions)
    selection = run(case, 192, budget(mode, [30], [101] if mode == "paper" else [5 * TILE],
                                      probe_last=64))
    check_covered(selection, mode, distance)


def check_covered(selection: Selection, mode: str, distance: int) -> None:
    if mode == "paper":
        assert distance in covered_distances(selection, 0)
    else:
        needed = {-TILE * (distance // TILE), -TILE * -(-distance // TILE)}
        assert needed <= set(offsets_of(selection, 0))


def test_column_of_middle_rows_needs_strided_probes(device: str) -> None:
    """Only rows 180 to 299 attend to the column; the last 64 do not know of it."""
    case = planted_column(75, range(180, 300), device)
    found = {strided: 75 in columns_of(run(case, START, budget(
        "tile", [10], [100], probe_strided=strided)), 0) for strided in (0, 64)}
    assert found == {0: False, 64: True}


def test_paper_mode_ignores_strided_probes(device: str) -> None:
    case = oracle.make_case(LENGTH, PLAIN, num_heads=1, head_dim=DIM, device=device)
    with_strided = run(case, START, budget("paper", [60], [150], probe_strided=64))
    without = run(case, START, budget("paper", [60], [150], probe_strided=0))
    assert torch.equal(with_strided.columns, without.columns)
    assert torch.equal(with_strided.offsets, without.offsets)
