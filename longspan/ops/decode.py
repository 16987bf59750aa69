"""Split-KV decode over the paged KV cache, all DCA zones in one launch (Triton, Ampere and later).

A work item is a run of one request's key tiles for one KV head; all query heads of that head are
computed together. How many items a request gets follows from the real lengths of the whole batch,
read on the device: the grid depends on shapes only (CUDA graphs), and a long request among short
ones still fills the GPU. A second kernel merges each request's items by their LSEs.
Sources: split-KV decoding (Flash-Decoding), DCA zones (arXiv 2402.17463).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.tiles.splits import num_sms
from longspan.ops.types import PagedKV, QueryRotary

PROGRAMS_PER_SM = 6
"""Work items of a launch for each SM: three run at a time, and two waves even out their ends."""
MIN_TILES = 2
"""Fewer key tiles than this are not worth an item of their own."""
TILE_BYTES = 16_384
"""Keys of one tile."""
STAGES = 3
"""With these a program takes 72 KB of shared memory: three of them fit an SM of Hopper, one fits
the smallest of Ampere."""
MIN_ROWS = 16
"""Smallest row count of `tl.dot`; the query heads of a KV head are padded to it."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


def decode_attention(
    q: Tensor, cache: PagedKV, block_tables: Tensor, context_lens: Tensor, rotary: QueryRotary,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.decode_attention`. Reads no device value on the host: graph capture is safe.

    Slots beyond a request's length may hold anything, NaN included. A request of length 0 gives
    out 0 and lse -inf. Needs what `supports` says.
    """
    batch, num_heads, head_dim = q.shape
    block_size, num_kv_heads = cache.k.shape[1], cache.k.shape[2]
    assert supports(cache, num_heads) and cache.k.stride() == cache.v.stride()
    assert q.stride(2) == 1 and block_tables.stride(1) == 1
    capacity = max(1, num_programs(q.device) // num_kv_heads)
    tile_len = _tile_len(cache.k)
    shared = {
        "num_requests": batch, "num_heads": num_heads, "capacity": capacity, "TILE": tile_len,
        "HEAD_DIM": head_dim, "REQUESTS": triton.next_power_of_2(batch), "MIN_TILES": MIN_TILES}
    parts = torch.empty(
        capacity + batch, num_heads, head_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(capacity + batch, num_heads, dtype=torch.float32, device=q.device)
    _attend_items[(num_kv_heads, capacity + batch)](
        q, cache.k, cache.v, block_tables, context_lens, scales, rotary.cos, rotary.sin, parts,
        part_lse, q.stride(0), q.stride(1), *cache.k.stride()[:3], block_tables.stride(0),
        rotary.stride, rotary.clamp, rotary.cos.shape[0], **shared, BLOCK=block_size,
        GROUP=num_heads // num_kv_heads, ROWS=_num_rows(num_heads // num_kv_heads),
        STAGES=STAGES, PRECISION=_precision(cache.k), num_warps=4)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _merge_items[(num_heads, batch)](
        parts, part_lse, context_lens, out, lse, out.stride(0), out.stride(1), **shared,
        ITEMS=32, num_warps=4)
    return out, lse


def supports(cache: PagedKV, num_heads: int) -> bool:
    """Return whether the kernel computes this cache: head dims and block sizes are powers of two
    from 16 on, rows are contiguous. Any float dtype."""
    _, block_size, num_kv_heads, head_dim = cache.k.shape
    sizes = (block_size, head_dim)
    return (all(size >= 16 and size & (size - 1) == 0 for size in sizes) and head_dim <= 256
            and num_heads % num_kv_heads == 0 and cache.k.stride(3) == 1)


def num_programs(device: torch.device) -> int:
    """Return how many work items of all KV heads a launch is cut into; a few for the
    interpreter."""
    if device.type == "cpu":
        return 4
    return PROGRAMS_PER_SM * num_sms(device)


def _num_rows(group: int) -> int:
    return max(MIN_ROWS, triton.next_power_of_2(group))


def _tile_len(keys: Tensor) -> int:
    """Return the number of keys in a tile, a divisor of the block size."""
    return min(keys.shape[1], max(16, TILE_BYTES // (keys.shape[3] * keys.element_size())))


def _precision(keys: Tensor) -> str:
    return "ieee" if keys.dtype == torch.float32 else "tf32"


@triton.jit
def _work_items(
    context_lens, num_requests, capacity,
    TILE: tl.constexpr, REQUESTS: tl.constexpr, MIN_TILES: tl.constexpr,
):
    """Count key tiles and work items of each request, and find where its items end: three of
    [REQUESTS].

    Items of the batch have the same number of tiles, up to one: at most ``capacity`` + requests.
    """
    rows = tl.arange(0, REQUESTS)
    lens = tl.load(context_lens + rows, mask=rows < num_requests, other=0).to(tl.int32)
    tiles = (lens + TILE - 1) // TILE
    tiles_per_item = tl.maximum((tl.sum(tiles, 0) + capacity - 1) // capacity, MIN_TILES)
    items = (tiles + tiles_per_item - 1) // tiles_per_item
    return tiles, items, tl.cumsum(items, 0)


@triton.jit
def _attend_items(
    q, k, v, block_tables, context_lens, scales, cos, sin, parts, part_lse,
    q_row, q_head, kv_block, kv_slot, kv_head, table_row, dca_stride, clamp, num_rotations,
    num_requests, num_heads, capacity,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, REQUESTS: tl.constexpr, MIN_TILES: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one work item: partial out [H, D] normalised, and its LSE to base 2, for one KV
    head."""
    head, item = tl.program_id(0), tl.program_id(1)
    tiles, items, ends = _work_items(
        context_lens, num_requests, capacity, TILE, REQUESTS, MIN_TILES)
    request = tl.sum((ends <= item).to(tl.int32), 0)
    if request >= num_requests:
        return
    is_request = tl.arange(0, REQUESTS) == request
    num_tiles = tl.sum(tl.where(is_request, tiles, 0), 0)
    num_items = tl.sum(tl.where(is_request, items, 0), 0)
    part = item - tl.sum(tl.where(is_request, ends, 0), 0) + num_items
    context_len = tl.load(context_lens + request).to(tl.int32)
    start = num_tiles * part // num_items * TILE
    stop = tl.minimum(num_tiles * (part + 1) // num_items * TILE, context_len)

    scale = tl.load(scales + request) * _LOG2_E
    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    queries = q + request.to(tl.int64) * q_row + head * GROUP * q_head
    keys, values = k + head * kv_head, v + head * kv_head
    table = block_tables + request.to(tl.int64) * table_row
    local = (context_len - 1) % dca_stride
    chunk_start = context_len - 1 - local
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for zone in tl.static_range(3):
        if zone == 0:  # intra
            first, last, rotation = chunk_start, context_len, local
        elif zone == 1:  # succ
            first, last = chunk_start - dca_stride, chunk_start
            rotation = tl.minimum(local + dca_stride, clamp)
        else:  # inter
            first, last = chunk_start * 0, chunk_start - dca_stride
            rotation = tl.minimum(local * 0 + 2 * dca_stride - 1, clamp)
        first = tl.maximum(first, start).to(tl.int32)
        last = tl.minimum(last, stop).to(tl.int32)
        rotation = tl.minimum(rotation, num_rotations - 1)  # of a zone without keys: any
        turned = _rotated_query(
            queries, cos, sin, rotation, q_head, heads, dims, GROUP, HEAD_DIM)
        top, total, acc = _attend_keys(
            turned, keys, values, table, first, last, context_len, scale, top, total, acc,
            kv_block, kv_slot, dims, TILE, BLOCK, STAGES, PRECISION)

    rows = item * num_heads + head * GROUP + heads
    tl.store(part_lse + rows, top + tl.log2(total), mask=heads < GROUP)
    tl.store(parts + rows[:, None] * HEAD_DIM + dims[None, :], acc / total[:, None],
             mask=(heads < GROUP)[:, None])


@triton.jit
def _rotated_query(
    queries, cos, sin, rotation, q_head, heads, dims,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Load the query heads of one KV head, [ROWS, D] in their dtype, rotated in fp32; padding is
    0."""
    half: tl.constexpr = HEAD_DIM // 2
    rows = queries + heads[:, None] * q_head
    mask = (heads < GROUP)[:, None]
    x = tl.load(rows + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(rows + ((dims + half) % HEAD_DIM)[None, :], mask=mask, other=0.0)
    other = tl.where((dims < half)[None, :], -other.to(tl.float32), other.to(tl.float32))
    at = rotation.to(tl.int64) * half + dims % half
    turned = x * tl.load(cos + at)[None, :] + other * tl.load(sin + at)[None, :]
    return turned.to(queries.dtype.element_ty)


@triton.jit
def _attend_keys(
    q, keys, values, table, first, last, context_len, scale, top, total, acc,
    kv_block, kv_slot, dims,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):
    """Carry the online softmax over keys [first, last) of one zone; a tile on its border is
    masked."""
    per_block: tl.constexpr = BLOCK // TILE
    slots = tl.arange(0, TILE)
    first_tile = first // TILE
    last_tile = tl.where(last > first, (last + TILE - 1) // TILE, first_tile)
    block = tl.load(table + first_tile // per_block, mask=last > first, other=0)
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        position = tile * TILE + slots
        offset = block.to(tl.int64) * kv_block + (tile % per_block) * TILE * kv_slot
        inside = slots[:, None] * kv_slot + dims[None, :]
        k = tl.load(keys + offset + inside)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        visible = (position >= first) & (position < last)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: a visited tile holds a visible key
        decay = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * decay + tl.sum(weights, 1)
        # values of slots never written may be NaN, and 0 * NaN is NaN
        v = tl.load(values + offset + inside, mask=(position < context_len)[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
        following = tile + 1  # its block id is fetched a tile ahead, off the loads' critical path
        block = tl.load(table + following // per_block, mask=following < last_tile, other=0)
    return top, total, acc


@triton.jit
def _merge_items(
    parts, part_lse, context_lens, out, lse, out_row, out_head,
    num_requests, num_heads, capacity,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, REQUESTS: tl.constexpr, MIN_TILES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Merge all items of one request and query head into one row, with the LSE to base e."""
    head, request = tl.program_id(0), tl.program_id(1)
    _, items, ends = _work_items(context_lens, num_requests, capacity, TILE, REQUESTS, MIN_TILES)
    is_request = tl.arange(0, REQUESTS) == request
    stop = tl.sum(tl.where(is_request, ends, 0), 0)
    start = stop - tl.sum(tl.where(is_request, items, 0), 0)
    dims = tl.arange(0, HEAD_DIM)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(start, stop, ITEMS):
        item = first + tl.arange(0, ITEMS)
        row = item * num_heads + head
        logs = tl.load(part_lse + row, mask=item < stop, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(logs, 0))
        weights = tl.exp2(logs - new_top)
        part = tl.load(parts + row[:, None] * HEAD_DIM + dims[None, :],
                       mask=(item < stop)[:, None], other=0.0)
        decay = tl.exp2(top - new_top)
        acc = acc * decay + tl.sum(part * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        top = new_top
    total_or_1 = tl.where(total > 0, total, 1.0)
    place = out + request.to(tl.int64) * out_row + head * out_head
    tl.store(place + dims, (acc / total_or_1).to(out.dtype.element_ty))
    tl.store(lse + request * num_heads + head + tl.arange(0, 1), (top + tl.log2(total)) * _LN_2)
