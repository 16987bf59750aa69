"""Query rotations for each zone against the specification's rotation and positions."""

from __future__ import annotations

import math

import pytest
import torch

from longspan.ops import geometry, reference
from longspan.ops.tiles.rotary import num_zones, rotated_query_variants
from tests.conftest import assert_close
from tests.ops import oracle
from tests.ops.oracle import Positions

# positions, cached length, queries, heads, tile length
SHAPES = [
    (Positions(4096, 96), 0, 1, 1, 16), (Positions(4096, 96), 5, 63, 7, 16),
    (Positions(64, 16), 0, 48, 5, 16), (Positions(64, 16), 37, 30, 4, 16),
    (Positions(64, 16), 100, 111, 3, 32), (Positions(64, 48), 0, 129, 9, 16),
    (Positions(64, 16), 77, 40, 2, 1),
    # both released strides: the last rows of the second DCA chunk, the first of the third
    (Positions(262_144, 8_192), 507_884, 40, 2, 16),
    (Positions(131_072, 4_096), 253_932, 40, 2, 16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize(("positions", "cached_len", "num_queries", "heads", "tile_len"), SHAPES)
def test_variants_equal_reference(
    positions: Positions, cached_len: int, num_queries: int, heads: int, tile_len: int,
    head_dim: int, dtype: torch.dtype, kernel_device: str,
) -> None:
    context_len, scale = cached_len + num_queries, 0.37
    rotary = oracle.tables(head_dim, positions, context_len)
    rotary = rotary._replace(cos=rotary.cos.to(kernel_device), sin=rotary.sin.to(kernel_device))
    # rows of a wider projection: not contiguous
    q = torch.randn(num_queries, heads + 2, head_dim).to(kernel_device, dtype)[:, 1 : heads + 1]
    variants = rotated_query_variants(q, cached_len, rotary, scale, tile_len)
    first = cached_len // tile_len * tile_len
    zones = min((context_len - 1) // positions.stride, 2) + 1
    assert variants.dtype == dtype and zones == num_zones(context_len, positions.stride)
    num_rows = -(-context_len // tile_len) * tile_len - first
    assert variants.shape == (zones, heads, num_rows, head_dim)
    assert variants.isfinite().all()
    rows = torch.arange(cached_len, context_len, device=kernel_device)
    for zone in range(zones):
        needed = rows // positions.stride >= zone
        turns = geometry.query_position(rows, zone, rotary.stride, rotary.clamp)[needed]
        expected = reference.rotate(
            q[needed].float(), rotary.cos[turns], rotary.sin[turns]) * scale / math.log(2)
        actual = variants[zone].permute(1, 0, 2)[cached_len - first :][: num_queries][needed]
        assert_close(actual, expected, f"zone {zone}", dtype)
    outside = torch.ones(num_rows, dtype=torch.bool)
    outside[cached_len - first : context_len - first] = False
    assert (variants[:, :, outside] == 0).all()
