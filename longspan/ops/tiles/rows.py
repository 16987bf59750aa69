"""Triton: rows normed, and keys loaded and rotated, as kernels with other ends share them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normed_rows(
    values, residual, weight, place, column, mask, dim, eps,
    DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    """Norm rows [ROWS, WIDTH] of fp32 ``values``, with what is added to the residual at ``place``
    where there is one. In DTYPE."""
    if HAS_RESIDUAL:
        values += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(DTYPE)
        tl.store(residual + place, rounded, mask=mask)
        values = rounded.to(tl.float32)
    mean_square = tl.sum(values * values, 1) / dim
    values = (values * tl.rsqrt(mean_square + eps)[:, None]).to(DTYPE).to(tl.float32)
    scale = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    return (values * scale[None, :]).to(DTYPE)


@triton.jit
def rotated_rows(
    k, positions, cos, sin, row, head, mask, num_rows, k_row, dca_stride, HEAD_DIM: tl.constexpr,
):
    """Load keys of one KV head and rotate them, [ROWS, D], in their own type."""
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, HEAD_DIM)
    rotation = tl.load(positions + row, mask=row < num_rows, other=0).to(tl.int64) % dca_stride
    turn = rotation[:, None] * half + (dims % half)[None, :]
    keys = k + (row.to(tl.int64) * k_row + head * HEAD_DIM)[:, None]
    key = tl.load(keys + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(keys + ((dims + half) % HEAD_DIM)[None, :], mask=mask, other=0.0)
    other = tl.where((dims < half)[None, :], -other.to(tl.float32), other.to(tl.float32))
    turned = (key * tl.load(cos + turn, mask=mask, other=0.0)
              + other * tl.load(sin + turn, mask=mask, other=0.0))
    return turned.to(k.dtype.element_ty)
