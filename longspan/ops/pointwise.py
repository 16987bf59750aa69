"""Fused pointwise work (Triton): norm with residual, SwiGLU, keys rotated into the paged KV cache.

Numbers are computed in fp32 and rounded where `reference` rounds, except between the factors of
SwiGLU. Nothing is read on the host: graph capture is safe.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.tiles.rows import normed_rows, rotated_rows
from longspan.ops.types import PagedKV, QueryRotary

TILE = 4_096
"""Elements that a program holds."""
FEW_ROWS = 64
"""Up to this many tokens each is a program of its own: a decode step is all latency."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`. x: [T, M] or [T, H, M], the last axis contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, None, weight, eps, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`. ``residual`` is changed in place. x, residual: [T, M]."""
    assert residual.is_contiguous() and x.shape == residual.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, residual, weight, eps, out)
    return out, residual


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`. gate_up: [T, 2F], the last axis contiguous."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    tile = min(TILE // 4, triton.next_power_of_2(width))
    if num_rows:
        _silu_mul[(num_rows, triton.cdiv(width, tile))](
            gate_up, out, width, gate_up.stride(0), TILE=tile, num_warps=4)
    return out


def store_kv(
    cache: PagedKV, k: Tensor, v: Tensor, positions: Tensor, slot_mapping: Tensor,
    filled_blocks: Tensor, rotary: QueryRotary,
) -> None:
    """See `reference.store_kv`. k, v: [T, K, D], heads contiguous; D a power of two."""
    num_rows, num_kv_heads, head_dim = k.shape
    block_size = cache.k.shape[1]
    assert k.stride()[1:] == v.stride()[1:] == (head_dim, 1)
    assert cache.k.is_contiguous() and cache.v.is_contiguous()
    rows = 1 if num_rows <= FEW_ROWS else max(1, TILE // 2 // head_dim)
    if num_rows:
        _store_rotated[(triton.cdiv(num_rows, rows), num_kv_heads)](
            k, v, cache.k, cache.v, positions, slot_mapping, rotary.cos, rotary.sin, num_rows,
            k.stride(0), v.stride(0), rotary.stride, ROWS=rows, HEAD_DIM=head_dim,
            num_warps=1 if rows == 1 else 4)
    if cache.k_mean is not None and filled_blocks.shape[0]:
        _block_means[(filled_blocks.shape[0], num_kv_heads)](
            cache.k, cache.v, cache.k_mean, cache.v_mean, filled_blocks, BLOCK=block_size,
            HEAD_DIM=head_dim, TILE=min(block_size, max(1, TILE // head_dim)), num_warps=4)


def supports_store(cache: PagedKV) -> bool:
    """Return whether `store_kv` writes this cache: head dim and block size are powers of two."""
    return all(size & (size - 1) == 0 for size in (cache.k.shape[1], cache.k.shape[3]))


def _launch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> None:
    """Launch the norm of x, whose rows lie at two strides, so that heads of a merged projection
    need no copy."""
    dim = x.shape[-1]
    inner = x.shape[1] if x.ndim == 3 else 1
    assert x.ndim in (2, 3) and x.stride(-1) == 1
    num_rows, width = x.shape[0] * inner, triton.next_power_of_2(dim)
    rows = max(1, TILE // width) if num_rows > FEW_ROWS else 1
    if num_rows:
        _rms_norm[(triton.cdiv(num_rows, rows),)](
            x, x if residual is None else residual, weight, out, num_rows, dim, inner, x.stride(0),
            x.stride(1) if x.ndim == 3 else 0, eps, HAS_RESIDUAL=residual is not None, ROWS=rows,
            WIDTH=width, num_warps=1 if rows * width <= 512 else 4 if width <= 2048 else 8)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x, residual, weight, out, num_rows, dim, inner, x_outer, x_inner, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = (row < num_rows)[:, None] & (column < dim)[None, :]
    start = (row // inner) * x_outer + (row % inner) * x_inner
    values = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    place = row[:, None] * dim + column[None, :]
    values = normed_rows(values, residual, weight, place, column, mask, dim, eps,
                         out.dtype.element_ty, HAS_RESIDUAL)
    tl.store(out + place, values, mask=mask)


@triton.jit
def _silu_mul(gate_up, out, width, row_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < width
    start = gate_up + row * row_stride + column
    gate = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + width, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _store_rotated(
    k, v, cache_k, cache_v, positions, slot_mapping, cos, sin, num_rows, k_row, v_row, dca_stride,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Rotate and store ROWS tokens of one KV head."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_mapping + row, mask=row < num_rows, other=-1).to(tl.int64)
    mask = (slot >= 0)[:, None]
    dims = tl.arange(0, HEAD_DIM)
    place = (slot * tl.num_programs(1) + head)[:, None] * HEAD_DIM + dims[None, :]

    value = tl.load(v + (row.to(tl.int64) * v_row + head * HEAD_DIM)[:, None] + dims[None, :],
                    mask=mask, other=0.0)
    tl.store(cache_v + place, value.to(cache_v.dtype.element_ty), mask=mask)

    turned = rotated_rows(k, positions, cos, sin, row, head, mask, num_rows, k_row, dca_stride,
                          HEAD_DIM)
    tl.store(cache_k + place, turned.to(cache_k.dtype.element_ty), mask=mask)


@triton.jit
def _block_means(
    cache_k, cache_v, k_mean, v_mean, filled_blocks,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):
    """Store the mean key and value of one block and KV head, summed in fp32."""
    block = tl.load(filled_blocks + tl.program_id(0)).to(tl.int64)
    if block < 0:
        return
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    dims = tl.arange(0, HEAD_DIM)
    key = tl.zeros([HEAD_DIM], tl.float32)
    value = tl.zeros([HEAD_DIM], tl.float32)
    for first in tl.static_range(0, BLOCK, TILE):
        slot = block * BLOCK + first + tl.arange(0, TILE)
        place = (slot * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
        key += tl.sum(tl.load(cache_k + place).to(tl.float32), 0)
        value += tl.sum(tl.load(cache_v + place).to(tl.float32), 0)
    place = (block * num_heads + head) * HEAD_DIM + dims
    tl.store(k_mean + place, (key / BLOCK).to(k_mean.dtype.element_ty))
    tl.store(v_mean + place, (value / BLOCK).to(v_mean.dtype.element_ty))
