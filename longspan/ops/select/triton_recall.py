"""`recall.measure_recall` in Triton: one pass of few rows over all keys, nothing to wait for.

Rows of the heads of one KV head lie side by side, R of each, so that a key tile is loaded once for
all of them. Each program walks every n-th key tile and keeps, for each row, the largest logit and
two sums of exponentials: over all keys and over the kept ones. Scores carry scale * log2(e).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.geometry import ZONES, query_position
from longspan.ops.reference import rotate
from longspan.ops.select.recall import place_rows
from longspan.ops.select.triton_scouts import column_flags
from longspan.ops.select.triton_tiles import SPANS, load_keys, load_rows, zone_tiles
from longspan.ops.types import PagedKV, QueryRotary, Selection

ROWS = 16
"""Rows of one head in the kernel, at least twice `recall.ROWS_PER_KIND`."""


def measure_recall(
    q: Tensor, cache: PagedKV, block_table: Tensor, start: int, rotary: QueryRotary, scale: float,
    selection: Selection, num_programs: int,
) -> Tensor:
    """See `recall.measure_recall`. For selections in tile mode; num_programs: as many as the device
    runs at once."""
    num_queries, num_heads, head_dim = q.shape
    rows, k = place_rows(num_queries, selection), cache.k
    tile_len, num_kv_heads = k.shape[1:3]
    num_tiles = -(-(start + num_queries) // tile_len)
    chunk_start = start // rotary.stride * rotary.stride
    zones = min(len(ZONES), 1 + chunk_start // rotary.stride)
    queries = _rotated(q, rows, start, rotary, scale, zones)
    positions = torch.nn.functional.pad(start + rows, (0, ROWS - rows.shape[1]), value=-1).int()
    kept = _kept_tiles(selection, positions, num_tiles)
    is_column = column_flags(selection.columns, num_tiles, tile_len)
    programs = min(num_tiles, max(1, num_programs // num_kv_heads))
    group = num_heads // num_kv_heads
    width = triton.next_power_of_2(group * ROWS)
    partial = torch.empty(3, programs, num_heads, ROWS, dtype=torch.float32, device=q.device)
    sum_masses[(programs, num_kv_heads)](
        queries, k, block_table, positions, kept, is_column, partial, *k.stride()[:3], num_heads,
        zones, num_tiles, max(0, chunk_start - rotary.stride) // tile_len, chunk_start // tile_len,
        start, GROUP=group, RP=ROWS, BM=width, P=tile_len, D=head_dim,
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32", num_warps=8, num_stages=2)
    top, every, ours = partial[..., : rows.shape[1]]
    share = torch.exp2(top - top.amax(0))
    return (ours * share).sum(0) / (every * share).sum(0)


def _rotated(
    q: Tensor, rows: Tensor, start: int, rotary: QueryRotary, scale: float, zones: int,
) -> Tensor:
    """Return the rows' queries rotated for each zone, scale * log2(e) in them, padded with 0:
    [zones, H, ROWS, D]. Zone 0 is the own one."""
    num_heads, count = rows.shape
    heads = torch.arange(num_heads, device=q.device)[:, None]
    chosen = q[rows, heads].flatten(0, 1)[:, None]  # [H * R, 1, D]
    out = q.new_zeros(zones, num_heads, ROWS, q.shape[2])
    for zone in range(zones):
        place = query_position(start + rows.flatten(), zone, rotary.stride, rotary.clamp)
        place = place.clamp(max=rotary.cos.shape[0] - 1)
        factor = scale * math.log2(math.e)
        turned = rotate(chosen, rotary.cos[place] * factor, rotary.sin[place] * factor)
        out[zone, :, :count] = turned.view(num_heads, count, -1)
    return out


def _kept_tiles(selection: Selection, positions: Tensor, num_tiles: int) -> Tensor:
    """Return which whole key tiles the rows keep, [H, ROWS, num_tiles] int8: windows and listed
    tiles."""
    tile_len, offsets = selection.tile_len, selection.offsets
    own = (positions // tile_len).clamp(min=selection.first_tile).long()
    is_window = offsets.new_zeros(len(offsets), num_tiles, dtype=torch.int8)
    gaps = (-offsets // tile_len).clamp(min=0, max=num_tiles - 1)
    is_window.scatter_(1, gaps, (-offsets // tile_len < num_tiles).to(torch.int8))
    is_window[:, 0] = 1
    gap = own[..., None] - torch.arange(num_tiles, device=own.device)
    kept = is_window.gather(1, gap.clamp(min=0).flatten(1)).view_as(gap)
    if selection.tiles is not None:
        heads = torch.arange(len(own), device=own.device)[:, None]
        tiles = selection.tiles[heads, own - selection.first_tile].long()
        listed = kept.new_zeros(*own.shape, num_tiles + 1)
        listed.scatter_(2, tiles.where(tiles >= 0, num_tiles), 1)
        kept = kept | listed[..., :num_tiles]
    return kept.contiguous()


@triton.jit(do_not_specialize=["num_heads", *SPANS[1:], "start"])
def sum_masses(
    queries, keys, table, positions, kept_tiles, is_column, partial, stride_block, stride_token,
    stride_head, num_heads, num_zones, num_tiles, inter_end, succ_end, start,
    GROUP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Sum the exponentials of every n-th key tile for RP rows of each head of one KV head.

    queries: [zones, H, RP, D]; positions: [H, RP] int32, -1 in padding; kept_tiles: [H, RP, tiles]
    int8; partial: [3, programs, H, RP]: the largest logit, the mass of all keys relative to it, and
    of those kept. Grid (programs, KV heads).
    """
    program, kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys += kv * stride_head
    row, lane = tl.arange(0, BM), tl.arange(0, P)
    exists = row < GROUP * RP
    place = kv * GROUP * RP + row  # of the row among those of all heads
    position = tl.load(positions + place, mask=exists, other=-1)
    head = place // RP
    top = tl.full([BM], -1e30, tl.float32)
    every = tl.zeros([BM], tl.float32)
    ours = tl.zeros([BM], tl.float32)
    for zone in range(num_zones):
        first, stop = zone_tiles(zone, program, tl.num_programs(0), num_tiles, inter_end, succ_end)
        q = load_rows(queries, (zone * num_heads + kv * GROUP) * RP, row, GROUP * RP, D)
        for tile in range(first, stop, tl.num_programs(0)):
            k = load_keys(keys, table, tile, stride_block, stride_token, P, D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            key = tile * P + lane
            if tile >= start // P:  # slots past the context may hold anything
                scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
            window = tl.load(kept_tiles + place * num_tiles + tile, mask=exists, other=0)
            column = tl.load(is_column + head[:, None] * ((num_tiles + 1) * P) + key[None, :],
                             mask=exists[:, None], other=0)
            new_top = tl.maximum(top, tl.max(scores, 1))
            mass = tl.exp2(scores - new_top[:, None])
            kept = tl.where((window[:, None] | column) != 0, mass, 0.0)
            scaled = tl.exp2(top - new_top)
            every = every * scaled + tl.sum(mass, 1)
            ours = ours * scaled + tl.sum(kept, 1)
            top = new_top
    size = tl.num_programs(0).to(tl.int64) * num_heads * RP
    target = partial + program.to(tl.int64) * num_heads * RP + place
    tl.store(target, top, mask=exists)
    tl.store(target + size, every, mask=exists)
    tl.store(target + 2 * size, ours, mask=exists)
