"""The oracle beside every other choice: no key tiles hold more attention mass than its own."""

from __future__ import annotations

import itertools

import pytest
import torch

from longspan.bench.engine.oracle import Oracle
from longspan.ops import measure_recall, prefill_attention, sparse_prefill_attention
from longspan.ops.types import Budget
from tests.conftest import assert_close
from tests.ops import oracle
from tests.ops.oracle import Positions

BUDGET = Budget((0, 0), (16, 16), "tile", 16, 0, 0, 16)


@pytest.mark.parametrize("positions", [Positions(4096, 96), Positions(128, 32)],
                         ids=["one zone", "zones"])
def test_no_other_tiles_hold_more(positions: Positions) -> None:
    """Other sets of as many tiles, for the last query tile of each head, hold no more."""
    start, length = 288, 352
    case = oracle.make_case(length, positions, num_heads=2, num_kv_heads=1, head_dim=16,
                            block_size=16, gain=1.5)
    cache = oracle.only_first(case, length)
    args = case.q[start:], cache, case.block_table, start, case.rotary, case.scale
    found = Oracle(0.2)(*args, BUDGET)
    assert found.tiles is not None and found.first_tile == 18
    kept = [[sorted(set(row) - {-1}) for row in rows] for rows in found.tiles.tolist()]
    assert [len(row) for row in kept[0]] == [3, 3, 4, 4]  # a fifth of 19 to 22, less its own
    assert all(max(row) < 18 + index for rows in kept for index, row in enumerate(rows))
    _, full = prefill_attention(*args)

    def mass(head: int, tiles: tuple[int, ...]) -> float:
        row = torch.full((2, 4, 4), -1, dtype=torch.int32)
        row[head, 3, :4] = torch.tensor(sorted(tiles), dtype=torch.int32)
        _, lse, _ = sparse_prefill_attention(*args, found._replace(tiles=row), False)
        return float(torch.exp(lse - full)[48:, head].sum())

    for head in range(2):
        own = mass(head, tuple(kept[head][3]))
        others = [mass(head, tiles) for tiles in
                  itertools.islice(itertools.combinations(range(21), 4), 0, None, 61)]
        assert own >= max(others) - 1e-5 and own > sum(others) / len(others) + 0.1


def test_all_tiles_are_dense_attention() -> None:
    case = oracle.make_case(352, Positions(128, 32), num_heads=2, num_kv_heads=1, head_dim=16,
                            block_size=16)
    args = (case.q[288:], oracle.only_first(case, 352), case.block_table, 288, case.rotary,
            case.scale)
    found = Oracle(1.0)(*args, BUDGET)
    out, _, _ = sparse_prefill_attention(*args, found, False)
    assert_close(out, prefill_attention(*args)[0])
    assert measure_recall(*args, found).min() > 0.999
