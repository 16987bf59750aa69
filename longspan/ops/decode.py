"""Split-KV decode over the paged KV cache, all DCA zones in one launch (Triton, Ampere and later).

A work item is a run of one request's key tiles for one KV head; all query heads of that head are
computed together, and so are a few consecutive tokens of one sequence: their keys are read once.
How many items a request gets follows from the real lengths of the whole batch, read on the device:
the grid depends on shapes only (CUDA graphs), and a long request among short ones still fills the
GPU. A second kernel merges each request's items by their LSEs.
Sources: split-KV decoding (Flash-Decoding), DCA zones (arXiv 2402.17463).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.tiles.items import merge_items, work_items
from longspan.ops.tiles.splits import num_sms
from longspan.ops.types import KeySpans, PagedKV, QueryRotary


class Launch(NamedTuple):
    """How a number of rows is computed: measured, see `log.md`."""

    programs_per_sm: int
    """Work items of a launch for each SM: two waves even out their ends."""
    tile_bytes: int
    """Keys of one tile."""
    stages: int
    warps: int
    max_registers: int
    """The most that a thread takes; what is spilled lies outside the loop over keys."""


LAUNCHES = {16: Launch(6, 16_384, 3, 4, 168), 32: Launch(4, 16_384, 3, 4, 255),
            64: Launch(4, 16_384, 3, 4, 255), 128: Launch(2, 16_384, 3, 8, 255)}
"""By rows, padded. With 16 rows a program takes 72 KB of shared memory: three of them fit an SM of
Hopper, one fits the smallest of Ampere. With 128 rows one fits."""
MIN_TILES = 2
"""Fewer key tiles than this are not worth an item of their own."""
MIN_ROWS, MAX_ROWS = 16, 128
"""Fewest rows of `tl.dot`, to which the query heads of a KV head are padded, and the most that are
computed together."""
MAX_LAUNCHES = 2
"""More query tokens than fit that many launches are left to the prefill kernels."""

_LOG2_E = tl.constexpr(1.4426950408889634)


def decode_attention(
    q: Tensor, cache: PagedKV, block_tables: Tensor, context_lens: Tensor, rotary: QueryRotary,
    scales: Tensor, spans: KeySpans | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.decode_attention`. Reads no device value on the host: graph capture is safe.

    Slots beyond a request's length may hold anything, NaN included. A request of length 0 gives
    out 0 and lse -inf. With ``spans``, out is fp32: it is to be merged with that of other keys.
    Needs what `supports` says.
    """
    return _attend(q, cache, block_tables, context_lens, rotary, scales, 1, spans)


def prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.prefill_attention`: few rows, as many as `takes_rows` says. No host sync."""
    most = MAX_ROWS * cache.k.shape[2] // q.shape[1]
    parts, start = [], cached_len
    for rows in q.tensor_split(-(-q.shape[0] // most)):
        start += len(rows)
        lens = torch.full((1,), start, dtype=torch.int64, device=q.device)
        scales = torch.full((1,), scale, dtype=torch.float32, device=q.device)
        parts.append(_attend(rows, cache, block_table[None], lens, rotary, scales, len(rows)))
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


def takes_rows(q: Tensor, cache: PagedKV, rotary: QueryRotary) -> bool:
    """Return whether `prefill_attention` computes these queries, few rows of one sequence.
    q: [T, H, D]."""
    num_rows, num_heads, _ = q.shape
    most = MAX_ROWS * cache.k.shape[2] // num_heads
    return (0 < num_rows <= MAX_LAUNCHES * most and supports(cache, num_heads)
            and min(num_rows, most) <= rotary.stride and cache.k.stride() == cache.v.stride()
            and q.dtype == cache.dtype and q.stride(2) == 1)


def _attend(
    q: Tensor, cache: PagedKV, block_tables: Tensor, context_lens: Tensor, rotary: QueryRotary,
    scales: Tensor, num_rows: int, spans: KeySpans | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with the last ``num_rows`` tokens of each of B requests. They lie in two DCA chunks at
    most. q: [B * num_rows, H, D]; returns the same and [B * num_rows, H]."""
    num_heads, head_dim = q.shape[1:]
    batch, block_size, num_kv_heads = len(context_lens), cache.k.shape[1], cache.k.shape[2]
    assert supports(cache, num_heads) and cache.k.stride() == cache.v.stride()
    assert q.stride(2) == 1 and block_tables.stride(1) == 1 and len(q) == batch * num_rows
    group = num_heads // num_kv_heads
    rows = _num_rows(group * num_rows)
    launch = LAUNCHES[min(rows, MAX_ROWS)]
    capacity = max(1, num_programs(q.device, rows) // num_kv_heads)
    shared = {
        "num_requests": batch, "capacity": capacity, "TILE": _tile_len(cache.k, rows),
        "HEAD_DIM": head_dim, "REQUESTS": triton.next_power_of_2(batch), "MIN_TILES": MIN_TILES}
    # heads of one row after those of another: for the merge they are all heads
    width = num_rows * num_heads
    parts = torch.empty(capacity + batch, width, head_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(capacity + batch, width, dtype=torch.float32, device=q.device)
    is_quantised = cache.k_scale is not None
    scales_and_gain = ((cache.k_scale, cache.v_scale, cache.k_gain) if is_quantised
                       else (part_lse, part_lse, part_lse))  # not read
    first, counts = (context_lens, context_lens) if spans is None else spans[:2]
    block_len, block_start = (0, 0) if spans is None else spans[2:]
    assert num_rows == 1 or not block_len
    _attend_items[(num_kv_heads, capacity + batch)](
        q, cache.k, cache.v, *scales_and_gain, block_tables, context_lens, first, counts, scales,
        rotary.cos, rotary.sin, parts, part_lse, q.stride(0), q.stride(1), *cache.k.stride()[:3],
        block_tables.stride(0), rotary.stride, rotary.clamp, rotary.cos.shape[0],
        block_start, num_heads=num_heads, num_rows=num_rows, **shared, BLOCK=block_size,
        WHOLE=block_len or block_size, GROUP=group, ROWS=rows,
        SEVERAL=num_rows > 1, SPANS=spans is not None, QUANTISED=is_quantised,
        STAGES=launch.stages, PRECISION=_precision(cache), num_warps=launch.warps,
        maxnreg=launch.max_registers)
    out = torch.empty(
        q.shape, dtype=q.dtype if spans is None else torch.float32, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    merge_items[(width, batch)](
        parts, part_lse, counts, out, lse, width, **shared, ITEMS=32, num_warps=4)
    return out, lse


def supports(cache: PagedKV, num_heads: int) -> bool:
    """Return whether the kernel computes this cache: head dims and block sizes are powers of two
    from 16 on, rows are contiguous. Any float dtype, or int8 with scales."""
    _, block_size, num_kv_heads, head_dim = cache.k.shape
    sizes = (block_size, head_dim)
    return (all(size >= 16 and size & (size - 1) == 0 for size in sizes) and head_dim <= 256
            and num_heads % num_kv_heads == 0 and cache.k.stride(3) == 1)


def num_programs(device: torch.device, rows: int) -> int:
    """Return how many work items of all KV heads a launch is cut into; a few for the
    interpreter."""
    if device.type == "cpu":
        return 4
    return LAUNCHES[min(rows, MAX_ROWS)].programs_per_sm * num_sms(device)


def _num_rows(count: int) -> int:
    return max(MIN_ROWS, triton.next_power_of_2(count))


def _tile_len(keys: Tensor, rows: int) -> int:
    """Return the number of keys in a tile, a divisor of the block size. With many rows it is the
    scores that fill the registers."""
    tile_bytes = LAUNCHES[min(rows, MAX_ROWS)].tile_bytes
    size = keys.element_size() if rows < MAX_ROWS // 2 else max(2, keys.element_size())
    return min(keys.shape[1], max(16, tile_bytes // (keys.shape[3] * size)))


def _precision(cache: PagedKV) -> str:
    return "ieee" if cache.dtype == torch.float32 else "tf32"


@triton.jit(do_not_specialize=["num_rows", "table_row"])
def _attend_items(
    q, k, v, k_scale, v_scale, k_gain, block_tables, context_lens, span_first, counts, scales, cos,
    sin, parts, part_lse,
    q_row, q_head, kv_block, kv_slot, kv_head, table_row, dca_stride, clamp, num_rotations,
    block_start, num_requests, num_heads, num_rows, capacity,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, REQUESTS: tl.constexpr, MIN_TILES: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SEVERAL: tl.constexpr, SPANS: tl.constexpr, QUANTISED: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one work item: partial out [rows, H, D] normalised, and its LSE to base 2, for one KV
    head. Keys are counted as the cache holds them: all, or from ``block_start`` on BLOCK of each
    WHOLE."""
    head, item = tl.program_id(0), tl.program_id(1)
    tiles, items, ends = work_items(counts, num_requests, capacity, TILE, REQUESTS, MIN_TILES)
    request = tl.sum((ends <= item).to(tl.int32), 0)
    if request >= num_requests:
        return
    is_request = tl.arange(0, REQUESTS) == request
    num_tiles = tl.sum(tl.where(is_request, tiles, 0), 0)
    num_items = tl.sum(tl.where(is_request, items, 0), 0)
    part = item - tl.sum(tl.where(is_request, ends, 0), 0) + num_items
    context_len = tl.load(context_lens + request).to(tl.int32)
    start = num_tiles * part // num_items * TILE
    stop = num_tiles * (part + 1) // num_items * TILE
    if SPANS:
        before = tl.load(span_first + request).to(tl.int32)
        start += before
        stop = tl.minimum(stop, tl.load(counts + request).to(tl.int32)) + before
    else:
        stop = tl.minimum(stop, context_len)

    scale = tl.load(scales + request) * _LOG2_E
    lanes = tl.arange(0, ROWS)
    row, head_of = lanes // GROUP, lanes % GROUP
    is_row = row < num_rows
    dims = tl.arange(0, HEAD_DIM)
    queries = q + head * GROUP * q_head + head_of * q_head + tl.where(
        is_row, request * num_rows + row, 0).to(tl.int64) * q_row
    keys, values = k + head * kv_head, v + head * kv_head
    table = block_tables + request.to(tl.int64) * table_row
    positions = tl.maximum(context_len - num_rows + tl.minimum(row, num_rows - 1), 0)
    local, chunks = positions % dca_stride, positions // dca_stride
    last_chunk = (context_len - 1) // dca_stride
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    # Runs of keys that lie in one zone for each row: the last DCA chunk, those before it, and all
    # farther ones. Rows before a chunk border see one chunk fewer. An item has keys of few runs.
    farthest: tl.constexpr = 3 if SEVERAL else 2
    lowest = _position(start, block_start, BLOCK, WHOLE)
    highest = _position(stop - 1, block_start, BLOCK, WHOLE)
    nearest_run = tl.minimum(last_chunk - highest // dca_stride, farthest).to(tl.int32)
    farthest_run = tl.minimum(last_chunk - lowest // dca_stride, farthest).to(tl.int32)
    held_len = _held(context_len, block_start, BLOCK, WHOLE)
    for back in range(nearest_run, farthest_run + 1):
        border = _held((last_chunk - back) * dca_stride, block_start, BLOCK, WHOLE)
        first = tl.where(back == farthest, 0, border)
        last = _held((last_chunk - back + 1) * dca_stride, block_start, BLOCK, WHOLE)
        first = tl.maximum(first, start).to(tl.int32)
        last = tl.minimum(last, stop).to(tl.int32)
        gap = chunks - (last_chunk - back)
        rotation = tl.where(
            gap <= 0, local, tl.minimum(tl.where(gap == 1, local + dca_stride, 2 * dca_stride - 1),
                                        clamp))
        rotation = tl.minimum(rotation, num_rotations - 1)  # of a zone without keys: any
        turned = _rotated_query(queries, cos, sin, rotation, is_row, dims, HEAD_DIM)
        if QUANTISED:
            turned = turned * tl.load(k_gain + head * HEAD_DIM + dims).to(tl.float32)[None, :]
        turned = turned.to(q.dtype.element_ty)
        top, total, acc = _attend_keys(
            turned, keys, values, k_scale + head * BLOCK, v_scale + head * BLOCK, table, first,
            last, held_len, positions, scale, top, total, acc, kv_block, kv_slot,
            tl.num_programs(0) * BLOCK, dims, TILE, BLOCK, SEVERAL, QUANTISED, STAGES, PRECISION)

    rows = (item * num_rows + row) * num_heads + head * GROUP + head_of
    tl.store(part_lse + rows, top + tl.log2(total), mask=is_row)
    if SEVERAL:
        total = tl.where(total > 0, total, 1.0)  # a row that sees none of the item's keys
    tl.store(parts + rows[:, None] * HEAD_DIM + dims[None, :], acc / total[:, None],
             mask=is_row[:, None])


@triton.jit
def _position(index, block_start, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Find the position of a key that the cache holds."""
    position = index
    if WHOLE != BLOCK:
        position = index // BLOCK * WHOLE + block_start + index % BLOCK
    return position


@triton.jit
def _held(position, block_start, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Count the keys before a position that the cache holds."""
    count = position
    if WHOLE != BLOCK:
        within = tl.minimum(tl.maximum(position % WHOLE - block_start, 0), BLOCK)
        count = position // WHOLE * BLOCK + within
    return count


@triton.jit
def _rotated_query(queries, cos, sin, rotation, is_row, dims, HEAD_DIM: tl.constexpr):
    """Load rows of queries, [ROWS, D] fp32, rotated and rounded to their dtype; padding is 0."""
    half: tl.constexpr = HEAD_DIM // 2
    mask = is_row[:, None]
    x = tl.load(queries[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(queries[:, None] + ((dims + half) % HEAD_DIM)[None, :], mask=mask, other=0.0)
    other = tl.where((dims < half)[None, :], -other.to(tl.float32), other.to(tl.float32))
    at = rotation.to(tl.int64)[:, None] * half + (dims % half)[None, :]
    turned = x * tl.load(cos + at) + other * tl.load(sin + at)
    return turned.to(queries.dtype.element_ty).to(tl.float32)


@triton.jit
def _attend_keys(
    q, keys, values, k_scale, v_scale, table, first, last, held_len, positions, scale, top,
    total, acc, kv_block, kv_slot, scale_block, dims,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SEVERAL: tl.constexpr, QUANTISED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):
    """Carry the online softmax over keys [first, last), each row's of one zone; a tile on their
    border is masked, and keys behind a row."""
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
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale
        if QUANTISED:
            steps = block.to(tl.int64) * scale_block + (tile % per_block) * TILE + slots
            scores = scores * tl.load(k_scale + steps)[None, :]
        visible = ((position >= first) & (position < last))[None, :]
        if SEVERAL:
            visible = visible & (position[None, :] <= positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # of a single row finite: it sees a key
        known_top = new_top
        if SEVERAL:
            known_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - known_top)
        weights = tl.exp2(scores - known_top[:, None])
        total = total * decay + tl.sum(weights, 1)
        # values of slots never written may be NaN, and 0 * NaN is NaN
        if QUANTISED:
            v = tl.load(values + offset + inside).to(q.dtype)
            step = tl.load(v_scale + steps, mask=position < held_len, other=0.0)
            weights = weights * step[None, :]
        else:
            v = tl.load(values + offset + inside, mask=(position < held_len)[:, None],
                        other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
        following = tile + 1  # its block id is fetched a tile ahead, off the loads' critical path
        block = tl.load(table + following // per_block, mask=following < last_tile, other=0)
    return top, total, acc
