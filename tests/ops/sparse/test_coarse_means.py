"""Means of eight tiles far before the queries: every path against the fp64 oracle."""

from __future__ import annotations

import random

import pytest

from longspan.ops.geometry import near_border
from tests.ops import oracle
from tests.ops.oracle import Positions
from tests.ops.sparse import test_eager, test_triton

PLAIN, ZONED = Positions(4096, 96), Positions(288, 32)  # stride 256: two groups of eight tiles
TILE, SEED = 16, 20261128
CASES = [
    pytest.param(PLAIN, 0, 304, 3, 1, id="from-zero"),
    pytest.param(PLAIN, 288, 448, 2, 2, id="with-history"),
    pytest.param(ZONED, 400, 512, 4, 2, id="succ"),
    pytest.param(ZONED, 640, 752, 2, 1, id="inter"),
]


def test_border() -> None:
    """A multiple of eight, never nearer than asked for, and at most seven tiles farther."""
    for tile in range(70):
        assert near_border(tile, None) == 0
        for near in (0, 1, 8, 13, 200):
            border = near_border(tile, near)
            assert border % 8 == 0 and border <= max(0, tile - near) < border + 8


@pytest.mark.parametrize("near", [0, 3, 11, 500])
@pytest.mark.parametrize(("positions", "start", "length", "heads", "kv_heads"), CASES)
@pytest.mark.parametrize("impl", test_eager.IMPLEMENTATIONS)
def test_equals_oracle(
    impl: object, positions: Positions, start: int, length: int, heads: int, kv_heads: int,
    near: int, device: str,
) -> None:
    """Windows, columns and listed tiles among those that share a mean."""
    rng = random.Random(SEED + near)
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            with_means=True, device=device)
    selection = test_eager.tile_selection(rng, heads, length, TILE, device)
    selection = oracle.with_lists(rng, selection, start, length, 6)._replace(near_tiles=near)
    test_eager.check(impl, case, positions, start, selection, correction=True)  # type: ignore


@pytest.mark.parametrize("listed", [False, True], ids=["plain", "listed"])
@pytest.mark.parametrize("near", [0, 3, 11, 500])
@pytest.mark.parametrize(("positions", "start", "length", "heads", "kv_heads"), CASES)
def test_kernel_equals_reference(
    positions: Positions, start: int, length: int, heads: int, kv_heads: int, near: int,
    listed: bool, kernel_device: str,
) -> None:
    """More groups than keys at once, too."""
    rng = random.Random(SEED + near)
    case = oracle.make_case(length, positions, num_heads=heads, num_kv_heads=kv_heads,
                            head_dim=32, with_means=True, device=kernel_device)
    selection = test_triton.tile_selection(rng, heads, length, TILE, kernel_device)
    if listed:
        selection = oracle.with_lists(rng, selection, start, length, 6)
    test_triton.check(case, start, selection._replace(near_tiles=near), correction=True)
