"""Lists of key tiles against a slow independent restatement, and on a planted question."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan.ops.select import scouts
from longspan.ops.select.eager import select_vertical_slash
from longspan.ops.types import Budget, Selection
from tests.ops import oracle
from tests.ops.oracle import Case, Positions
from tests.ops.select import test_eager

PLAIN = Positions(4096, 96)
ZONED = Positions(128, 32)  # stride 96: six tiles of 16
RELEASED = (Positions(2048, 64), Positions(1024, 32))  # 262,144 / 8,192 and 131,072 / 4,096
TILE = 16


def budget(heads: int, **changes: float) -> Budget:
    policy: dict[str, float] = {"probe_last": 16, "probe_strided": 0, "sink": 4, "local": 20,
                                "num_scouts": 12, "scout_threshold": -1.0, "scout_tiles": 3}
    return Budget(vertical=(9,) * heads, slash=(40,) * heads, mode="tile",
                  **(policy | changes))  # type: ignore[arg-type]


def run(case: Case, start: int, limits: Budget) -> Selection:
    return select_vertical_slash(
        case.q[start:], oracle.only_first(case, len(case.q)), case.block_table, start, case.rotary,
        case.scale, limits)


def logits(case: Case, positions: Positions, head: int, rows: list[int]) -> Tensor:
    """[rows, L] fp64 at continuous positions; -inf for keys behind the row."""
    stride, length = positions.stride, len(case.k)
    added = (0, stride, positions.chunk_size)
    distances = torch.tensor([
        [row % stride + added[min(2, row // stride - key // stride)] - key % stride
         if key <= row else 0 for key in range(length)] for row in rows])
    kv_head = head // (case.q.shape[1] // case.k.shape[1])
    scores = oracle.scores(case.q[rows, head : head + 1].cpu(), case.k[:, kv_head : kv_head + 1],
                           distances, case.rotary.inv_freq.cpu())[0] * case.scale
    return scores.masked_fill(torch.arange(length) > torch.tensor(rows)[:, None], -math.inf)


def expected_lists(
    case: Case, positions: Positions, start: int, selection: Selection, limits: Budget, head: int
) -> list[list[int]]:
    """Row by row, key by key."""
    q = case.q[start:, head].cpu().double()
    cosines = torch.cosine_similarity(q, q.mean(0, keepdim=True)).tolist()
    rows = sorted(range(len(q)), key=lambda row: cosines[row])[: limits.num_scouts]
    seen = oracle.union(selection._replace(tiles=None), start, len(case.q))[head]
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        scores = logits(case, positions, head, [start + row])[0]
        lse, kept = float(scores[seen[row]].logsumexp(0)), seen[row].tolist()
        for key, score in enumerate(scores[: start + row + 1].tolist()):
            excess = score - lse
            if not kept[key] and excess > limits.scout_threshold:
                tiles = found.setdefault((start + row) // TILE, {})
                tiles[key // TILE] = max(tiles.get(key // TILE, -math.inf), excess)
    return [sorted(sorted(tiles, key=lambda t: -tiles[t])[: limits.scout_tiles])
            for tiles in (found.get(tile, {}) for tile in range(
                start // TILE, -(-len(case.q) // TILE)))]


@pytest.mark.parametrize(("positions", "start", "length"), [
    (PLAIN, 0, 63), (PLAIN, 90, 299), (PLAIN, 192, 193), (ZONED, 96, 192), (ZONED, 304, 347),
    *((positions, 2 * positions.stride + 16, 2 * positions.stride + 111)
      for positions in RELEASED)], ids=str)
@pytest.mark.parametrize("tiles", [1, 3, 999])
def test_lists_equal_slow_restatement(
    positions: Positions, start: int, length: int, tiles: int, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fewer rows than scouts, more tiles than a list holds, lists larger than all tiles."""
    monkeypatch.setattr(scouts, "ROWS_AT_ONCE", 5)
    case = oracle.make_case(length, positions, num_heads=4, num_kv_heads=2, gain=1.2, device=device)
    limits = budget(4, scout_tiles=tiles)
    selection = run(case, start, limits)
    assert selection.tiles is not None and selection.first_tile == start // TILE
    lists = [[[tile for tile in row if tile >= 0] for row in rows]
             for rows in selection.tiles.tolist()]
    assert (selection.tiles.dtype, selection.tiles.shape[:2]) == (
        torch.int32, (4, -(-length // TILE) - start // TILE))
    for head in range(4):
        assert lists[head] == expected_lists(case, positions, start, selection, limits, head)
    if length > 192 + 1:
        assert any(any(row) for rows in lists for row in rows), "nothing was tested"


@pytest.mark.parametrize(
    "positions", [Positions(262_144, 8_192), Positions(131_072, 4_096)], ids=str)
def test_lists_behind_a_released_stride(positions: Positions) -> None:
    """Both released strides at their true sizes: one query tile in the third DCA chunk."""
    start = 2 * positions.stride
    case = oracle.make_case(start + TILE, positions, num_heads=1, gain=1.2)
    limits = budget(1, probe_last=2, num_scouts=3, scout_threshold=-4.0)
    selection = run(case, start, limits)
    assert selection.tiles is not None
    lists = [[tile for tile in row if tile >= 0] for row in selection.tiles[0].tolist()]
    assert lists == expected_lists(case, positions, start, selection, limits, 0)
    assert any(lists), "nothing was tested"
    columns, windows = test_eager.tile_choice(case, positions, 0, start, limits)
    assert test_eager.columns_of(selection, 0) == columns
    assert test_eager.offsets_of(selection, 0) == [-TILE * window for window in windows]


@pytest.mark.parametrize("mode", ["tile", "paper"])
def test_no_scouts(mode: str, device: str) -> None:
    """Without any, and in paper mode."""
    case = oracle.make_case(150, PLAIN, num_heads=2, device=device)
    limits = budget(2, num_scouts=0 if mode == "tile" else 12)._replace(mode=mode)
    assert run(case, 48, limits).tiles is None


def planted_question(row: int, key: int, positions: Positions, device: str) -> Case:
    """All queries point one way, where no key answers; the one at ``row`` asks for ``key``."""
    length = 384
    q, k = 0.1 * torch.randn(2, length, 1, 32)
    pair = [15, 31]  # the slowest: hardly turned by RoPE
    q[:, :, :8] += 2
    q[:, 0, pair] = 0.0
    q[row] = 0.0
    q[row, 0, pair], k[key, 0, pair] = 10.0, 10.0
    return oracle.make_case(length, positions, q=q, k=k, device=device)


@pytest.mark.parametrize("positions", [PLAIN, ZONED], ids=["one-zone", "three-zones"])
@pytest.mark.parametrize(("row", "key"), [(303, 21), (333, 100), (350, 255)])
def test_question_in_the_middle_brings_its_tile(
    row: int, key: int, positions: Positions, device: str
) -> None:
    """Onto the list of its own query tile, and no other."""
    case, start = planted_question(row, key, positions, device), 288
    limits = budget(1, num_scouts=4, scout_threshold=0.0)
    selection = run(case, start, limits._replace(vertical=(4,)))  # sinks and the local band only
    assert selection.tiles is not None
    lists = selection.tiles[0].tolist()
    assert key // TILE in lists[row // TILE - start // TILE]
    assert sum(key // TILE in tiles for tiles in lists) == 1
    assert int((selection.tiles >= 0).sum()) == 1


def test_lists_do_not_depend_on_the_order_of_calls(device: str) -> None:
    case = oracle.make_case(299, PLAIN, num_heads=2, device=device)
    first, again = (run(case, 96, budget(2)) for _ in range(2))
    assert first.tiles is not None and again.tiles is not None
    assert torch.equal(first.tiles, again.tiles)
