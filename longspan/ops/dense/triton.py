"""Dense causal prefill over the paged KV cache in one Triton kernel, Ampere and later.

Query tiles lie at absolute multiples of the KV block size P, so every query tile and every key tile
lies in one DCA chunk. A program walks the keys of one query tile and head zone by zone in one
online softmax and changes the query's rotation at zone borders. Few query tiles against a long
history are split along the keys and merged by LSE.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.geometry import INTER
from longspan.ops.tiles.rotary import rotated_query_variants
from longspan.ops.tiles.splits import launch_options, merge_splits, num_sms, num_splits
from longspan.ops.tiles.triton import add_tile, finish, scores_of
from longspan.ops.types import PagedKV, QueryRotary


def prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.prefill_attention`. Two launches, three where keys are split; no host sync."""
    tile_len = cache.k.shape[1]
    context_len = cached_len + q.shape[0]
    num_tiles = -(-context_len // tile_len) - cached_len // tile_len
    splits = num_splits(num_tiles * q.shape[1], -(-context_len // tile_len), num_sms(q.device))
    return split_prefill_attention(q, cache, block_table, cached_len, rotary, scale, splits)


def split_prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, splits: int,
) -> tuple[Tensor, Tensor]:
    """Compute `prefill_attention` with the keys of every query tile in ``splits`` parts."""
    num_queries, num_heads, head_dim = q.shape
    _, tile_len, num_kv_heads, _ = cache.k.shape
    context_len = cached_len + num_queries
    variants = rotated_query_variants(q, cached_len, rotary, scale, tile_len)
    shape = (num_queries, num_heads, head_dim)
    if splits == 1:
        out, lse = q.new_empty(shape), q.new_empty(shape[:2], dtype=torch.float32)
    else:
        out, lse = (q.new_empty((splits, *shape[:axes]), dtype=torch.float32) for axes in (3, 2))
    num_rows = variants.shape[2]
    # the stride in tiles; where it is no multiple of P, no position reaches it
    dca_tiles = -(-rotary.stride // tile_len)
    _dense_kernel[num_rows // tile_len * num_heads, splits](
        variants, cache.k, cache.v, block_table, out, lse, cached_len, context_len, num_rows,
        num_heads, num_kv_heads, dca_tiles, splits, INTER=INTER, GROUP=num_heads // num_kv_heads,
        TILE=tile_len, HEAD_DIM=head_dim, **launch_options(q.device, tile_len))
    return (out, lse) if splits == 1 else merge_splits(out, lse, q.dtype)


@triton.jit(do_not_specialize=[
    "cached_len", "context_len", "num_rows", "num_heads", "num_kv_heads", "dca_tiles", "splits"])
def _dense_kernel(
    q, k, v, block_table, out, lse, cached_len, context_len, num_rows, num_heads, num_kv_heads,
    dca_tiles, splits, INTER: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Compute one query tile of one head over one part of its keys.

    Neighbouring programs share a KV head and walk the same keys; late tiles, which have most keys,
    go first.
    """
    num_tiles = num_rows // TILE
    item = tl.program_id(0) // GROUP
    split = tl.program_id(1)
    head = item // num_tiles * GROUP + tl.program_id(0) % GROUP
    local_tile = num_tiles - 1 - item % num_tiles
    tile = cached_len // TILE + local_tile  # of the query
    share = tl.cdiv(tile, splits)
    first_key = split * share
    stop_key = tl.minimum(first_key + share, tile)
    chunk = tile // dca_tiles
    intra = chunk * dca_tiles  # first key tile of the zone
    succ = tl.maximum(intra - dca_tiles, 0)

    dims = tl.arange(0, HEAD_DIM)
    rows = tl.arange(0, TILE)
    lanes = tl.arange(0, KEYS)
    q_rows = ((head.to(tl.int64) * num_rows + local_tile * TILE) + rows)[:, None] * HEAD_DIM + dims
    zone_size = num_heads.to(tl.int64) * num_rows * HEAD_DIM
    kv_stride = num_kv_heads * HEAD_DIM
    kv_tile = lanes[:, None] * kv_stride + (head // GROUP) * HEAD_DIM + dims
    block_size = kv_stride.to(tl.int64) * TILE
    acc = tl.zeros([TILE, HEAD_DIM], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    for zone in range(tl.minimum(chunk, INTER) + 1):
        begin, end = 0, succ
        if zone == 0:
            begin, end = intra, tile
        elif zone == 1:
            begin, end = succ, intra
        begin, end = tl.maximum(begin, first_key), tl.minimum(end, stop_key)
        query = tl.load(q + zone * zone_size + q_rows)
        if (zone == 0) & (split == 0):  # the own tile, under the causal mask
            base = tl.load(block_table + tile) * block_size
            for part in range(0, TILE, KEYS):
                # slots past the context may hold anything
                exists = (tile * TILE + part + lanes < context_len)[:, None]
                key = tl.load(k + base + part * kv_stride + kv_tile, mask=exists, other=0.0)
                value = tl.load(v + base + part * kv_stride + kv_tile, mask=exists, other=0.0)
                scores = scores_of(query, key)
                scores = tl.where(part + lanes[None, :] <= rows[:, None], scores, float("-inf"))
                acc, total, top = add_tile(acc, total, top, scores, value)
        for part in range(begin * (TILE // KEYS), end * (TILE // KEYS)):
            base = tl.load(block_table + part // (TILE // KEYS)) * block_size
            base += part % (TILE // KEYS) * KEYS * kv_stride
            key = tl.load(k + base + kv_tile)
            value = tl.load(v + base + kv_tile)
            acc, total, top = add_tile(acc, total, top, scores_of(query, key), value)

    result, row_lse = finish(acc, total, top)
    position = tile * TILE + rows
    exists = (position >= cached_len) & (position < context_len)
    row = (split.to(tl.int64) * (context_len - cached_len) + position - cached_len) * num_heads
    row += head
    tl.store(out + row[:, None] * HEAD_DIM + dims, result.to(out.dtype.element_ty),
             mask=exists[:, None])
    tl.store(lse + row, row_lse, mask=exists)


