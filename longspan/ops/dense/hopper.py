"""Dense causal prefill on Hopper, in Gluon. See `hopper_tile` for how it works."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from longspan.ops.tiles.hopper import (
    HALF,
    STAGES,
    TILE,
    TILE_LEN,
    ZONES,
    as_they_are,
    causal,
    finish,
    first_step,
    key_tiles,
    load_queries,
    parity,
    query_halves,
    step,
    wait_for_queries,
    zone_of,
)
from longspan.ops.tiles.rotary import rotated_query_variants
from longspan.ops.tiles.splits import merge_splits, num_sms, num_splits
from longspan.ops.types import PagedKV, QueryRotary


def prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.prefill_attention`. No host sync."""
    num_queries, num_heads, head_dim = q.shape
    context_len = cached_len + num_queries
    first_tile, last_full = cached_len // TILE_LEN, context_len // TILE_LEN
    num_tiles = -(-context_len // TILE_LEN) - first_tile
    variants = rotated_query_variants(q, cached_len, rotary, scale, TILE_LEN)
    # every part of every query tile has a key tile
    splits = min(first_tile + 1, num_splits(
        num_tiles * num_heads, first_tile + num_tiles, num_sms(q.device)))
    out = torch.empty(splits, *q.shape, dtype=q.dtype if splits == 1 else torch.float32,
                      device=q.device)
    lse = torch.empty(splits, num_queries, num_heads, dtype=torch.float32, device=q.device)
    tail_k, tail_v = _tail(cache, block_table, context_len)
    _dense_kernel[(num_tiles * num_heads * splits,)](
        query_halves(variants), key_tiles(cache.k), key_tiles(cache.v), key_tiles(tail_k),
        key_tiles(tail_v), block_table, out, lse, num_tiles, first_tile,
        -(-rotary.stride // TILE_LEN), num_heads, splits, num_heads // cache.k.shape[2],
        last_full, cached_len, context_len, variants.shape[0], num_warps=4)
    return (out[0], lse[0]) if splits == 1 else merge_splits(out, lse, q.dtype)


def _tail(cache: PagedKV, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """Copy the last block where it is partly filled, [1, P, K, D], with zeros behind its keys:
    uninitialised values times a weight of 0 could be NaN."""
    count = context_len % TILE_LEN
    if count == 0:
        return cache.k[:1], cache.v[:1]  # not read
    block = block_table[context_len // TILE_LEN : context_len // TILE_LEN + 1]
    tail_k, tail_v = cache.k.index_select(0, block), cache.v.index_select(0, block)
    tail_k[:, count:] = 0
    tail_v[:, count:] = 0
    return tail_k, tail_v


@gluon.jit
def _dense_item(num_tiles, first_tile, stride_tiles, num_heads, num_splits, group):
    """Find this program's query tile, head, split, key tiles [low, high), and the first tile of the
    DCA chunk.

    Programs that run together share one KV head, whose tiles then come from the L2 cache; its late
    query tiles, which have most to do, go first.
    """
    item = gl.program_id(0) // group
    split = item % num_splits
    item = item // num_splits
    head = item // num_tiles * group + gl.program_id(0) % group
    tile = first_tile + num_tiles - 1 - item % num_tiles
    low = (tile + 1) * split // num_splits
    high = (tile + 1) * (split + 1) // num_splits
    return tile, head, split, low, high, tile // stride_tiles * stride_tiles


@gluon.jit
def _dense_producer(
    q_desc, k_desc, v_desc, k_tail, v_tail, block_table, q_smem, k_smem, v_smem, q_full, k_full,
    k_empty, v_full, v_empty, num_tiles, first_tile, stride_tiles, num_heads, num_splits, group,
    last_full, num_zones,
):
    tile, head, split, low, high, start = _dense_item(
        num_tiles, first_tile, stride_tiles, num_heads, num_splits, group)
    zone_rows = num_heads * num_tiles * TILE
    row = (head * num_tiles + tile - first_tile) * TILE
    load_queries(q_desc, q_smem, q_full, row, zone_rows, num_zones)
    column = head // group * TILE
    block = gl.load(block_table + high - 1).to(gl.int32)
    for i in range(high - low):
        key_tile = high - 1 - i
        following = gl.load(block_table + gl.maximum(key_tile - 1, 0)).to(gl.int32)
        slot = i % STAGES
        whole = key_tile < last_full
        mbarrier.wait(k_empty.index(slot), parity(i, STAGES) ^ 1)
        full = k_full.index(slot)
        mbarrier.expect(full, TILE * TILE * 2)
        tma.async_copy_global_to_shared(
            k_desc, [block * TILE, column], full, k_smem.index(slot), pred=whole)
        tma.async_copy_global_to_shared(
            k_tail, [0, column], full, k_smem.index(slot), pred=key_tile >= last_full)
        mbarrier.wait(v_empty.index(slot), parity(i, STAGES) ^ 1)
        full = v_full.index(slot)
        mbarrier.expect(full, TILE * TILE * 2)
        tma.async_copy_global_to_shared(
            v_desc, [block * TILE, column], full, v_smem.index(slot), pred=whole)
        tma.async_copy_global_to_shared(
            v_tail, [0, column], full, v_smem.index(slot), pred=key_tile >= last_full)
        block = following


@gluon.jit
def _dense_consumer(
    out, lse, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, num_tiles,
    first_tile, stride_tiles, num_heads, num_splits, group, first_row, end_row, num_zones,
    Q_HALF: gl.constexpr,
):
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    tile, head, split, low, high, start = _dense_item(
        num_tiles, first_tile, stride_tiles, num_heads, num_splits, group)
    previous = start - stride_tiles
    last = high - 1
    row = tile * TILE + Q_HALF * HALF
    wait_for_queries(q_full, num_zones)
    p, m, total = first_step(
        q_smem.index(2 * zone_of(last, start, previous) + Q_HALF), k_smem, k_full, k_empty, v_full,
        (last * TILE, row), causal, SCORES, PROBS)
    acc = gl.zeros([HALF, TILE], gl.float32, SCORES)
    for i in range(1, high - low):
        q = q_smem.index(2 * zone_of(last - i, start, previous) + Q_HALF)
        p, acc, m, total = step(i, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, p, acc, m,
                                total, (), as_they_are, SCORES, PROBS)
    part = split.to(gl.int64) * (end_row - first_row) * num_heads
    finish(out + part * TILE, lse + part, v_smem, last - low, p, acc, m, total, row, first_row,
            end_row, head, num_heads, SCORES)


@gluon.jit(do_not_specialize=[
    "num_tiles", "first_tile", "stride_tiles", "num_heads", "num_splits", "group", "last_full",
    "first_row", "end_row", "num_zones"])
def _dense_kernel(
    q_desc, k_desc, v_desc, k_tail, v_tail, block_table, out, lse, num_tiles, first_tile,
    stride_tiles, num_heads, num_splits, group, last_full, first_row, end_row, num_zones,
):
    """Compute one query tile of one head against one part of its keys."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * ZONES, HALF, TILE], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, TILE], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, TILE, TILE], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [ZONES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for zone in gl.static_range(ZONES):
        mbarrier.init(q_full.index(zone), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)  # both consumers
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_dense_consumer, (
            out, lse, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, num_tiles,
            first_tile, stride_tiles, num_heads, num_splits, group, first_row, end_row, num_zones,
            gl.constexpr(0))),
        (_dense_consumer, (
            out, lse, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, num_tiles,
            first_tile, stride_tiles, num_heads, num_splits, group, first_row, end_row, num_zones,
            gl.constexpr(1))),
        (_dense_producer, (
            q_desc, k_desc, v_desc, k_tail, v_tail, block_table, q_smem, k_smem, v_smem, q_full,
            k_full, k_empty, v_full, v_empty, num_tiles, first_tile, stride_tiles, num_heads,
            num_splits, group, last_full, num_zones)),
    ], [4, 1], [232, 40])
