"""A few query rows of one sequence over a long cache on Hopper, in Gluon.

What bounds it is reading keys and values once. All query heads of a KV head, of all rows, are one
tile of 64 or 128 rows (a row and head are a lane of it); a program walks one part of the keys with
it, as `hopper_tile` does: one consumer or two, of 64 lanes each, and a producer tiles ahead, so
that products and exponentials hide behind the copies. Parts are merged by LSE.

A consumer turns its queries itself, into shared memory, and anew where its keys pass from one DCA
chunk into another: rows on both sides of a chunk border have different zones for the same keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longspan.ops.tiles import hopper as hopper_tile
from longspan.ops.tiles.hopper import (
    HALF,
    TILE,
    TILE_LEN,
    add_values,
    first_step,
    key_tiles,
    load_tile,
    parity,
    step,
)
from longspan.ops.tiles.items import merge_items, num_items
from longspan.ops.tiles.rotary import LOG2_E
from longspan.ops.tiles.splits import num_sms
from longspan.ops.types import PagedKV, QueryRotary

MAX_LANES = 128
"""Rows times query heads of a KV head: more are no tile."""
MIN_TILES = 2
"""Fewer key tiles than this are not worth an item of their own."""
STAGES = 3
"""Key and value tiles in flight: with 128 lanes 224 KiB of shared memory."""

_FARTHEST = gl.constexpr(3)
_TAIL = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


def takes_rows(q: Tensor, cache: PagedKV, rotary: QueryRotary, context_len: int) -> bool:
    """Return whether `prefill_attention` computes these queries, few rows of one sequence.
    q: [T, H, D]."""
    lanes = q.shape[0] * q.shape[1] // cache.k.shape[2]
    return (0 < lanes <= MAX_LANES and q.shape[0] <= rotary.stride
            and hopper_tile.supports(q, cache, rotary, context_len))


def prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.prefill_attention`: few rows, as many as `takes_rows` says. No host sync."""
    return attend(q, cache, block_table, cached_len, rotary, scale, STAGES,
                  max(1, num_sms(q.device) // cache.k.shape[2]))


def attend(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, stages: int, capacity: int,
) -> tuple[Tensor, Tensor]:
    """Compute `prefill_attention` with the keys of each KV head in up to ``capacity`` parts."""
    num_rows, num_heads, head_dim = q.shape
    group, context_len = num_heads // cache.k.shape[2], cached_len + num_rows
    num_tiles = -(-context_len // TILE_LEN)
    items = num_items(num_tiles, capacity, MIN_TILES)
    # heads of one row after those of another: for the merge they are all heads
    width = num_rows * num_heads
    parts = torch.empty(items, width, head_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(items, width, dtype=torch.float32, device=q.device)
    _rows_kernel[(cache.k.shape[2], items)](
        key_tiles(cache.k), key_tiles(cache.v), _last_tile(cache.v, context_len), block_table, q,
        rotary.cos, rotary.sin, parts, part_lse, q.stride(0), q.stride(1), num_rows, num_heads,
        group, cached_len, rotary.stride, -(-rotary.stride // TILE_LEN), rotary.clamp,
        rotary.cos.shape[0], num_tiles, items, scale * LOG2_E, STAGES=stages,
        CONSUMERS=-(-num_rows * group // (TILE_LEN // 2)), num_warps=4)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    lens = torch.full((1,), context_len, dtype=torch.int64, device=q.device)
    merge_items[(width, 1)](
        parts, part_lse, lens, out, lse, width, 1, capacity, TILE=TILE_LEN, HEAD_DIM=head_dim,
        REQUESTS=1, MIN_TILES=MIN_TILES, ITEMS=32, num_warps=4)
    return out, lse


def _last_tile(values: Tensor, context_len: int) -> TensorDescriptor:
    """Describe tiles of a block that is filled as far as the last one is: slots behind that are
    read as zeros, since uninitialised values times a weight of 0 could be NaN.
    values: [N, P, K, D]."""
    flat = values.flatten(2)
    shape = [flat.shape[0], (context_len - 1) % TILE_LEN + 1, flat.shape[2]]
    return TensorDescriptor(flat, shape, list(flat.stride()), [1, TILE_LEN, TILE_LEN], _TAIL)


@gluon.jit
def _key_range(num_tiles, num_items):
    """Find this program's key tiles [low, high)."""
    item = gl.program_id(1)
    return num_tiles * item // num_items, num_tiles * (item + 1) // num_items


@gluon.jit
def _rows_producer(copies, ring):
    k_desc, v_desc, v_last, block_table, v_last_smem, num_tiles, num_items = copies
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = ring
    stages = k_smem.shape[0]
    low, high = _key_range(num_tiles, num_items)
    column = gl.program_id(0) * TILE
    block = gl.load(block_table + high - 1).to(gl.int32)
    for i in range(high - low):
        key_tile = high - 1 - i
        following = gl.load(block_table + gl.maximum(key_tile - 1, 0)).to(gl.int32)
        slot = i % stages
        is_last = key_tile == num_tiles - 1
        mbarrier.wait(k_empty.index(slot), parity(i, stages) ^ 1)
        load_tile(k_desc, block * TILE, column, k_full.index(slot), k_smem.index(slot))
        mbarrier.wait(v_empty.index(slot), parity(i, stages) ^ 1)
        full = v_full.index(slot)
        mbarrier.expect(full, TILE * TILE * 2)
        tma.async_copy_global_to_shared(
            v_desc, [block * TILE, column], full, v_smem.index(slot), pred=key_tile < num_tiles - 1)
        tma.async_copy_global_to_shared(
            v_last, [block, 0, column], full, v_last_smem.index(slot), pred=is_last)
        block = following


@gluon.jit
def _run_of(tile, last_chunk, stride_tiles):
    """Return how many DCA chunks a key tile lies before the last one; all that are farthest for
    every row count as one."""
    return gl.minimum(last_chunk - tile // stride_tiles, _FARTHEST)


@gluon.jit
def _turn_queries(
    q, cos, sin, q_smem, q_row, q_head, num_rows, group, cached_len, last_chunk, run, stride, clamp,
    num_rotations, scale, FIRST: gl.constexpr,
):
    """Write lanes FIRST to FIRST + 63 of a KV head's queries, turned for keys of a ``run``, to
    q_smem [64, D]; lanes that are no queries are 0."""
    PART: gl.constexpr = 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dims = gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    for part in gl.static_range(HALF // PART):
        lane = FIRST + part * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, LAYOUT))
        row = gl.minimum(lane // group, num_rows - 1)
        exists = (lane < num_rows * group)[:, None]
        position = cached_len + row
        local = position % stride
        gap = position // stride - (last_chunk - run)
        turn = gl.minimum(gl.where(gap == 1, local + stride, 2 * stride - 1), clamp)
        turn = gl.where(gap <= 0, local, turn)
        turn = gl.minimum(turn, num_rotations - 1)  # of a zone without keys: any
        angle = turn.to(gl.int64)[:, None] * HALF + dims
        c, s = gl.load(cos + angle) * scale, gl.load(sin + angle) * scale
        source = row.to(gl.int64) * q_row + (gl.program_id(0) * group + lane % group) * q_head
        place = source[:, None] + dims
        x = gl.load(q + place, exists, other=0.0).to(gl.float32)
        y = gl.load(q + place + HALF, exists, other=0.0).to(gl.float32)
        rows = q_smem.slice(part * PART, PART)
        rows.slice(0, HALF, dim=1).store((x * c - y * s).to(q_smem.dtype))
        rows.slice(HALF, HALF, dim=1).store((y * c + x * s).to(q_smem.dtype))
    fence_async_shared()


@gluon.jit
def _causal_lanes(s, slot, facts, SCORES: gl.constexpr):
    """Hide the keys behind each row, in the tiles that have any. facts: the key tile, the first
    row's position, lanes of a row, this consumer's first lane."""
    tile, cached_len, group, first = facts
    if (tile + 1) * TILE > cached_len + 1:
        lane = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
        keys = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
        s = gl.where(keys[None, :] <= cached_len + (lane // group)[:, None], s, float("-inf"))
    return s


@gluon.jit
def _rows_consumer(lanes, ring, CONSUMER: gl.constexpr):
    (q, cos, sin, parts, part_lse, q_smem, q_row, q_head, num_rows, num_heads, group, cached_len,
     stride, stride_tiles, clamp, num_rotations, num_tiles, num_items, scale) = lanes
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = ring
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    FIRST: gl.constexpr = CONSUMER * HALF
    low, high = _key_range(num_tiles, num_items)
    last_chunk = (cached_len + num_rows - 1) // stride
    query = q_smem.index(CONSUMER)
    run = _run_of(high - 1, last_chunk, stride_tiles)
    _turn_queries(q, cos, sin, query, q_row, q_head, num_rows, group, cached_len, last_chunk, run,
                  stride, clamp, num_rotations, scale, FIRST)
    p, m, total = first_step(query, k_smem, k_full, k_empty, v_full,
                             (high - 1, cached_len, group, FIRST), _causal_lanes, SCORES, PROBS)
    acc = gl.zeros([HALF, TILE], gl.float32, SCORES)
    for i in range(1, high - low):
        tile = high - 1 - i
        here = _run_of(tile, last_chunk, stride_tiles)
        if here != run:  # no product is under way
            _turn_queries(q, cos, sin, query, q_row, q_head, num_rows, group, cached_len,
                          last_chunk, here, stride, clamp, num_rotations, scale, FIRST)
        run = here
        p, acc, m, total = step(
            i, query, k_smem, v_smem, k_full, k_empty, v_full, v_empty, p, acc, m, total,
            (tile, cached_len, group, FIRST), _causal_lanes, SCORES, PROBS)
    acc = add_values(p, v_smem, high - low - 1, acc)
    lane = FIRST + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    dims = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    exists = lane < num_rows * group
    row = (gl.program_id(1) * num_rows + lane // group).to(gl.int64) * num_heads
    row += gl.program_id(0) * group + lane % group
    gl.store(part_lse + row, m + gl.log2(total), exists)
    acc = acc / gl.where(total > 0, total, 1.0)[:, None]  # a row that sees none of the keys
    gl.store(parts + row[:, None] * TILE + dims[None, :], acc, exists[:, None])


@gluon.jit(do_not_specialize=[
    "q_row", "q_head", "num_rows", "num_heads", "group", "cached_len", "stride", "stride_tiles",
    "clamp", "num_rotations", "num_tiles", "num_items"])
def _rows_kernel(
    k_desc, v_desc, v_last, block_table, q, cos, sin, parts, part_lse, q_row, q_head, num_rows,
    num_heads, group, cached_len, stride, stride_tiles, clamp, num_rotations, num_tiles, num_items,
    scale, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):
    """Compute all lanes of one KV head against one part of its keys: partial out [T, H, D],
    normalised, and its LSE to base 2."""
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, HALF, TILE], k_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, TILE], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, TILE, TILE], v_desc.layout)
    v_last_smem = v_smem._reinterpret(v_desc.dtype, [STAGES, 1, TILE, TILE], v_last.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=CONSUMERS)
        mbarrier.init(v_empty.index(slot), count=CONSUMERS)
    fence_async_shared()
    ring = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    lanes = (q, cos, sin, parts, part_lse, q_smem, q_row, q_head, num_rows, num_heads, group,
             cached_len, stride, stride_tiles, clamp, num_rotations, num_tiles, num_items, scale)
    copies = (k_desc, v_desc, v_last, block_table, v_last_smem, num_tiles, num_items)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_rows_consumer, (lanes, ring, gl.constexpr(0))),
            (_rows_producer, (copies, ring)),
        ], [1], [40])
    else:
        gl.warp_specialize([
            (_rows_consumer, (lanes, ring, gl.constexpr(0))),
            (_rows_consumer, (lanes, ring, gl.constexpr(1))),
            (_rows_producer, (copies, ring)),
        ], [4, 1], [232, 40])
