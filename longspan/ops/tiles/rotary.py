"""Queries rotated once for each DCA zone, as the prefill kernels read them.

One launch, bound by memory. The plain program is `reference.rotate` with the table rows of
`geometry.query_position`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.geometry import INTER
from longspan.ops.types import QueryRotary

LOG2_E = 1 / math.log(2)

_ROWS, _HEADS = 8, 28  # of one program: the more heads, the fewer loads of angles


def rotated_query_variants(
    q: Tensor, cached_len: int, rotary: QueryRotary, scale: float, tile_len: int
) -> Tensor:
    """Rotate every query for keys of each zone, scaled so that exp2 of dot products is right.

    Rotated in fp32 and multiplied by scale * log2(e) before the one rounding to q's dtype.

    Args:
        q: [T, H, D], not rotated, last axis contiguous; row 0 is position ``cached_len``.
        tile_len: rows of the result begin and end at multiples of it.
    Returns: [Z, H, n, D] in q's dtype. The first axis is the zone, Z the number of zones that any
        query needs; row r is position ``cached_len // tile_len * tile_len + r``. Rows outside the
        queries are 0; what a query does not need of a zone is finite and means nothing.
    """
    num_queries, num_heads, head_dim = q.shape
    assert q.stride(2) == 1, "head dims lie side by side"
    context_len = cached_len + num_queries
    first = cached_len // tile_len * tile_len
    num_rows = -(-context_len // tile_len) * tile_len - first
    out = torch.empty(num_zones(context_len, rotary.stride), num_heads, num_rows, head_dim,
                      dtype=q.dtype, device=q.device)
    grid = triton.cdiv(num_rows, _ROWS), triton.cdiv(num_heads, _HEADS)
    _rotate_kernel[grid](
        q, rotary.cos, rotary.sin, out, first, cached_len, context_len, num_rows, num_heads,
        rotary.cos.shape[0], rotary.stride, rotary.clamp, scale * LOG2_E, q.stride(0), q.stride(1),
        ZONES=out.shape[0], HALF=head_dim // 2, ROWS=_ROWS, HEADS=_HEADS)
    return out


def num_zones(context_len: int, stride: int) -> int:
    """Return how many zones the last of ``context_len`` tokens sees: 1 to 3."""
    return min((context_len - 1) // stride, INTER) + 1


_SCALARS = ["first", "cached_len", "context_len", "num_rows", "num_heads", "table_rows", "stride",
            "clamp"]


@triton.jit(do_not_specialize=_SCALARS)
def _rotate_kernel(
    q, cos, sin, out, first, cached_len, context_len, num_rows, num_heads, table_rows, stride,
    clamp, factor, q_row_stride, q_head_stride, ZONES: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr,
):
    """Rotate ROWS positions of HEADS heads, for all zones."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    position = first + rows
    exists = (position >= cached_len) & (position < context_len)
    dims = tl.arange(0, HALF)
    source = q + (position - cached_len).to(tl.int64)[:, None] * q_row_stride + dims
    local = position % stride
    cosines, sines = (), ()
    for zone in tl.static_range(ZONES):
        if zone == 0:
            turn = local
        elif zone == 1:
            turn = tl.minimum(local + stride, clamp)
        else:
            turn = tl.zeros_like(local) + tl.minimum(2 * stride - 1, clamp)
        # a zone that a row does not need may lie beyond the tables
        angle = tl.minimum(turn, table_rows - 1).to(tl.int64)[:, None] * HALF + dims
        cosines = cosines + (tl.load(cos + angle) * factor,)  # type: ignore[assignment]
        sines = sines + (tl.load(sin + angle) * factor,)  # type: ignore[assignment]
    first_head = tl.program_id(1) * HEADS
    inside = (rows < num_rows)[:, None]
    for head in range(first_head, tl.minimum(first_head + HEADS, num_heads)):
        x = tl.load(source + head * q_head_stride, mask=exists[:, None], other=0.0)
        y = tl.load(source + head * q_head_stride + HALF, mask=exists[:, None], other=0.0)
        x, y = x.to(tl.float32), y.to(tl.float32)
        for zone in tl.static_range(ZONES):
            c, s = cosines[zone], sines[zone]  # type: ignore[var-annotated]
            base = (zone * num_heads + head).to(tl.int64) * num_rows
            target = out + (base + rows)[:, None] * (2 * HALF) + dims
            tl.store(target, (x * c - y * s).to(out.dtype.element_ty), mask=inside)
            tl.store(target + HALF, (y * c + x * s).to(out.dtype.element_ty), mask=inside)
