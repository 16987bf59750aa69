"""Selection kernels against `ops.select`, their specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.ops import reference, select, sparse_index
from longspan.ops.select import Budget
from longspan.ops.types import Selection
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

PLAIN = Positions(4096, 96)
ZONED = Positions(128, 32)  # stride 96: six tiles of 16, three of 32


def budget(mode: str, vertical: list[int], slash: list[int], **changes: int) -> Budget:
    policy = {"probe_last": 64, "probe_strided": 0, "sink": 4 if mode == "tile" else 30,
              "local": 20 if mode == "tile" else 100}
    return Budget(vertical=tuple(vertical), slash=tuple(slash), mode=mode, **(policy | changes))


def run(case: Case, start: int, limits: Budget, module: object) -> Selection:
    cache = oracle.only_first(case, len(case.q))
    q = case.q[start:]
    assert sparse_index.supports(q, cache, case.rotary, start, limits)
    return module.select_vertical_slash(  # type: ignore[attr-defined]
        q, cache, case.block_table, start, case.rotary, case.scale, limits)


def entries(rows: Tensor, padding: int) -> list[list[int]]:
    """Rows without the padding, which may only stand at their end."""
    kept = [[value for value in row if value != padding] for row in rows.tolist()]
    assert [row[: len(short)] for row, short in zip(rows.tolist(), kept, strict=True)] == kept
    return kept


def massless(selection: Selection, start: int, length: int, limits: Budget) -> Tensor:
    """[H, S] keys that each probe row sees through a window or not at all."""
    last = min(limits.probe_last, length - start)
    strided = min(limits.probe_strided, length - start - last)
    step = (length - start - last) // strided if strided else 1
    rows = [start + step // 2 + step * i for i in range(strided)] + [*range(length - last, length)]
    queries = torch.arange(start, length)
    windows = selection._replace(columns=selection.columns[:, :0].cpu(),
                                 offsets=selection.offsets.cpu())
    seen = reference.kept_pairs(windows, queries, length)[:, torch.tensor(rows) - start]
    return (seen | (torch.arange(length) > torch.tensor(rows)[:, None])).all(1)


def check(case: Case, start: int, limits: Budget) -> Selection:
    """The same entries for every head, except that columns without any mass are all alike. The
    kernels may pad further."""
    actual, expected = (run(case, start, limits, module) for module in (sparse_index, select))
    assert (actual.tile_len, actual.aligned) == (expected.tile_len, expected.aligned)
    assert actual.columns.shape == expected.columns.shape
    offsets = [entries(s.offsets, s.tile_len) for s in (actual, expected)]
    assert offsets[0] == offsets[1]
    columns = [entries(s.columns, -1) for s in (actual, expected)]
    alike = massless(actual, start, len(case.q), limits)
    for head, (ours, theirs) in enumerate(zip(*columns, strict=True)):
        assert ours == sorted(set(ours)) and len(ours) == len(theirs), f"head {head}"
        differing = sorted(set(ours) ^ set(theirs))
        assert limits.mode == "tile" and alike[head, differing].all() or not differing, (
            f"columns {differing} of head {head}")
    return actual


TILE_CASES = [
    pytest.param(PLAIN, 0, 63, 16, id="63"), pytest.param(PLAIN, 0, 111, 16, id="111"),
    pytest.param(PLAIN, 192, 193, 32, id="one-token"), pytest.param(PLAIN, 160, 299, 16, id="299"),
    pytest.param(ZONED, 96, 192, 32, id="succ"), pytest.param(ZONED, 200, 288, 16, id="inter"),
    pytest.param(ZONED, 304, 347, 16, id="mid-chunk"),
]


@pytest.mark.parametrize("strided", [0, 7, 64], ids=lambda n: f"strided{n}")
@pytest.mark.parametrize(("positions", "start", "length", "tile"), TILE_CASES)
def test_tile_mode(
    positions: Positions, start: int, length: int, tile: int, strided: int, kernel_device: str
) -> None:
    """Four heads of one KV head, budgets four times apart."""
    case = oracle.make_case(length, positions, num_heads=4, head_dim=32, block_size=tile, gain=1.2,
                            device=kernel_device)
    check(case, start, budget("tile", [5, 10, 20, 0], [16, 32, 64, 48], probe_strided=strided))


@pytest.mark.parametrize("mode", ["tile", "paper"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (8, 2), (14, 2)])
def test_head_groups(num_heads: int, num_kv_heads: int, mode: str, kernel_device: str) -> None:
    case = oracle.make_case(180, PLAIN, num_heads=num_heads, num_kv_heads=num_kv_heads,
                            device=kernel_device)
    vertical, slash = ([10 + 9 * i % 40 for i in range(num_heads)] for _ in range(2))
    check(case, 100, budget(mode, vertical, [100 + s for s in slash] if mode == "paper" else slash,
                            probe_last=32))
