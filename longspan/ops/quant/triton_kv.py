"""Keys and values in int8 (Triton): rotated and written, means of blocks, written out again.

See `longspan.ops.int8_kv`. Nothing is read on the host: graph capture is safe.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.tiles.rows import rotated_rows
from longspan.ops.types import PagedKV, QueryRotary

TILE = 4_096
"""Elements that a program holds."""
FEW_ROWS = 64
"""Up to this many tokens each is a program of its own."""


def store_kv(
    cache: PagedKV, k: Tensor, v: Tensor, positions: Tensor, slot_mapping: Tensor,
    filled_blocks: Tensor, rotary: QueryRotary,
) -> None:
    """See `reference.store_kv`. k, v: [T, K, D], heads contiguous; D a power of two."""
    num_rows, num_kv_heads, head_dim = k.shape
    block_size = cache.k.shape[1]
    assert cache.k_scale is not None and cache.v_scale is not None and cache.k_gain is not None
    assert k.stride()[1:] == v.stride()[1:] == (head_dim, 1)
    assert all(part.is_contiguous() for part in cache.by_block().values())
    rows = 1 if num_rows <= FEW_ROWS else max(1, TILE // 2 // head_dim)
    if num_rows:
        _store_quantised[(triton.cdiv(num_rows, rows), num_kv_heads)](
            k, v, cache.k, cache.v, cache.k_scale, cache.v_scale, cache.k_gain, positions,
            slot_mapping, rotary.cos, rotary.sin, num_rows, k.stride(0), v.stride(0),
            rotary.stride, BLOCK=block_size, ROWS=rows, HEAD_DIM=head_dim,
            num_warps=1 if rows == 1 else 4)
    if cache.k_mean is not None and filled_blocks.shape[0]:
        _quantised_means[(filled_blocks.shape[0], num_kv_heads)](
            cache.k, cache.v, cache.k_scale, cache.v_scale, cache.k_gain, cache.k_mean,
            cache.v_mean, filled_blocks, BLOCK=block_size, HEAD_DIM=head_dim,
            TILE=min(block_size, max(1, TILE // head_dim)), num_warps=4)


def dense_kv(
    cache: PagedKV, block_table: Tensor, context_len: int,
) -> tuple[PagedKV, Tensor]:
    """See `int8_kv.dense_kv`."""
    _, block_size, num_kv_heads, head_dim = cache.k.shape
    assert all(part.is_contiguous() for part in cache.by_block().values())
    table = block_table[: -(-context_len // block_size)]
    shape = (len(table), *cache.k.shape[1:])
    k, v = (torch.empty(shape, dtype=cache.dtype, device=table.device)
            if part is None else part[: len(table)]
            for part in (cache.k_scratch, cache.v_scratch))
    assert len(k) == len(v) == len(table), "scratch memory holds the longest request"
    if len(table):
        _write_out[(len(table), num_kv_heads)](
            cache.k, cache.v, cache.k_scale, cache.v_scale, cache.k_gain, table, k, v,
            BLOCK=block_size, HEAD_DIM=head_dim,
            TILE=min(block_size, max(1, TILE // head_dim)), num_warps=4)
    means = (None if mean is None else mean.index_select(0, table)
             for mean in (cache.k_mean, cache.v_mean))
    return PagedKV(k, v, *means), torch.arange(len(table), device=table.device)


@triton.jit
def _quantised(x):
    """[ROWS, D] fp32 to int8 and [ROWS] scales."""
    scale = tl.max(tl.abs(x), 1) * (1.0 / 127)
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    steps = tl.floor(x * inverse[:, None] + 0.5)
    return tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8), scale


@triton.jit
def _store_quantised(
    k, v, cache_k, cache_v, k_scale, v_scale, k_gain, positions, slot_mapping, cos, sin, num_rows,
    k_row, v_row, dca_stride,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Rotate, quantise and store ROWS tokens of one KV head."""
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_mapping + row, mask=row < num_rows, other=-1).to(tl.int64)
    mask = (slot >= 0)[:, None]
    dims = tl.arange(0, HEAD_DIM)
    place = (slot * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    scale_place = (slot // BLOCK * num_heads + head) * BLOCK + slot % BLOCK

    value = tl.load(v + (row.to(tl.int64) * v_row + head * HEAD_DIM)[:, None] + dims[None, :],
                    mask=mask, other=0.0).to(tl.float32)
    numbers, scale = _quantised(value)
    tl.store(cache_v + place, numbers, mask=mask)
    tl.store(v_scale + scale_place, scale, mask=slot >= 0)

    turned = rotated_rows(k, positions, cos, sin, row, head, mask, num_rows, k_row, dca_stride,
                          HEAD_DIM)
    gain = tl.load(k_gain + head * HEAD_DIM + dims).to(tl.float32)
    numbers, scale = _quantised(turned.to(tl.float32) / gain[None, :])
    tl.store(cache_k + place, numbers, mask=mask)
    tl.store(k_scale + scale_place, scale, mask=slot >= 0)


@triton.jit
def _tile(
    stored, scales, block, head, num_heads, first,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):
    """Load numbers times scales of TILE slots of a block, [TILE, D] fp32."""
    slots, dims = first + tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    rows = ((block * BLOCK + slots) * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    scale = tl.load(scales + (block * num_heads + head) * BLOCK + slots)
    return tl.load(stored + rows).to(tl.float32) * scale[:, None]


@triton.jit
def _quantised_means(
    cache_k, cache_v, k_scale, v_scale, k_gain, k_mean, v_mean, filled_blocks,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):
    """Store the mean key and value of one block and KV head, summed in fp32."""
    block = tl.load(filled_blocks + tl.program_id(0)).to(tl.int64)
    if block < 0:
        return
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    key = tl.zeros([HEAD_DIM], tl.float32)
    value = tl.zeros([HEAD_DIM], tl.float32)
    for first in tl.static_range(0, BLOCK, TILE):
        key += tl.sum(_tile(cache_k, k_scale, block, head, num_heads, first, BLOCK, HEAD_DIM,
                            TILE), 0)
        value += tl.sum(_tile(cache_v, v_scale, block, head, num_heads, first, BLOCK, HEAD_DIM,
                              TILE), 0)
    dims = tl.arange(0, HEAD_DIM)
    key = key * tl.load(k_gain + head * HEAD_DIM + dims).to(tl.float32)
    place = (block * num_heads + head) * HEAD_DIM + dims
    tl.store(k_mean + place, (key / BLOCK).to(k_mean.dtype.element_ty))
    tl.store(v_mean + place, (value / BLOCK).to(v_mean.dtype.element_ty))


@triton.jit
def _write_out(
    cache_k, cache_v, k_scale, v_scale, k_gain, block_table, out_k, out_v,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):
    """Write out the keys and values of one block and KV head."""
    index = tl.program_id(0).to(tl.int64)
    block = tl.load(block_table + index).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    dims = tl.arange(0, HEAD_DIM)
    gain = tl.load(k_gain + head * HEAD_DIM + dims).to(tl.float32)
    for first in tl.static_range(0, BLOCK, TILE):
        slots = first + tl.arange(0, TILE)
        place = ((index * BLOCK + slots) * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
        key = _tile(cache_k, k_scale, block, head, num_heads, first, BLOCK, HEAD_DIM, TILE)
        value = _tile(cache_v, v_scale, block, head, num_heads, first, BLOCK, HEAD_DIM, TILE)
        tl.store(out_k + place, (key * gain[None, :]).to(out_k.dtype.element_ty))
        tl.store(out_v + place, value.to(out_v.dtype.element_ty))
