"""Scouts on the device: `scouts.add_scouts` in Triton, with the same rules and nothing to wait for.

One pass of the scouts over all keys gives, for each scout, its largest logit in each key tile,
columns left out: no exponentials, which would be needed for a few tiles in a hundred. The LSE of
what it keeps, columns and windows, comes from kernels that read those keys alone. Then each query
tile lists the key tiles with the largest excess over its scouts, windows left out. Scores carry
scale * log2(e), as in `triton_tiles`. On Hopper the pass is `hopper_scouts`.

Heads are taken as many at a time as the workspace allows.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from longspan.ops.geometry import num_scouts
from longspan.ops.select import scout_kernels, top_k
from longspan.ops.select import triton_tiles as probe
from longspan.ops.types import Budget, PagedKV, QueryRotary, Selection

WORKSPACE_BYTES = 160 << 20
"""For the largest logits of scouts in key tiles, and which keys are columns: 28 heads with 128
scouts each over a million keys."""
ROW_BLOCK = 128
"""Scouts in one matrix product."""
COLUMN_ROWS, COLUMN_BLOCK = 64, 64
"""Scouts and columns in one matrix product."""
COLUMN_PARTS = 4
"""Programs that share the columns of a head."""
WINDOW_ROWS = 16
"""Scouts of one query tile in one matrix product: there are seldom more."""
WAVES = 4
"""Programs over the device, in waves: one wave of heads times row blocks would leave many places
empty."""


class _Scouts(NamedTuple):
    """The scouts of all heads, for one segment."""

    rows: Tensor
    """[H, R] int32, ascending, from the segment's first query on"""
    queries: Tensor
    """[zones, H, RP, D] rotated, scale * log2(e) in them"""
    ends: Tensor
    """[H, n + 1] int32: how many stand before each of the segment's n query tiles; all."""
    start: int
    zones: tuple[int, int, int, int]
    """How many there are, all key tiles, and where the inter and the succ zone end."""

    @property
    def padded(self) -> int:
        """RP, a power of two."""
        return self.queries.shape[2]


class Flags(NamedTuple):
    """What the rows of some heads keep; n key tiles of P keys."""

    is_window: Tensor
    """[heads here, n] int8 by tile gap"""
    is_column: Tensor
    """[heads here, (n + 1) * P] int8; the last tile takes the padding"""


def add_scouts(
    selection: Selection, q: Tensor, cache: PagedKV, block_table: Tensor, start: int,
    rotary: QueryRotary, scale: float, budget: Budget, num_programs: int,
) -> Selection:
    """See `scouts.add_scouts`. num_programs: as many as the device runs at once."""
    num_heads, tile_len = q.shape[1], selection.tile_len
    count = num_scouts(len(q), start + len(q), budget.num_scouts, budget.most_scouts)
    padded = max(16, triton.next_power_of_2(max(count, budget.num_scouts)))
    scouts = _rotated(q, _place(q, count), start, rotary, scale, tile_len, padded)
    num_tiles, first_tile = scouts.zones[1], start // tile_len
    tiles = torch.empty(num_heads, num_tiles - first_tile, budget.scout_tiles, dtype=torch.int32,
                        device=q.device)
    group = num_heads // cache.k.shape[2]
    bytes_per_group = group * num_tiles * (4 * padded + tile_len + 1)
    at_once = max(1, min(num_heads // group, WORKSPACE_BYTES // bytes_per_group)) * group
    for first in range(0, num_heads, at_once):
        part = slice(first, min(num_heads, first + at_once))
        flags = _flags(selection, part, num_tiles)
        lse = _kept(selection, scouts, cache, block_table, part, flags)
        missed = _score(scouts, cache, block_table, part, flags, num_programs)
        scout_kernels.list_tiles[tiles.shape[1], part.stop - first](
            missed, lse, flags.is_window, scouts.ends, tiles, first, start // tile_len, num_tiles,
            tiles.shape[2], budget.scout_threshold * math.log2(math.e), padded,
            BLOCK=max(1024, triton.next_power_of_2(num_tiles)),
            WIDTH=triton.next_power_of_2(tiles.shape[2]), num_warps=8)
        del missed  # or the next heads' would be allocated beside them
    return selection._replace(tiles=tiles, first_tile=first_tile, scouts=scouts.rows)


def _place(q: Tensor, count: int) -> Tensor:
    """Return `scouts.place_scouts` of all heads: [H, R] int32."""
    num_queries, num_heads, head_dim = q.shape
    count = min(count, num_queries)
    mean = _mean(q)
    differences = torch.empty(num_heads, num_queries, dtype=torch.float32, device=q.device)
    scout_kernels.mean_differences[(triton.cdiv(num_queries, 64), num_heads)](
        q, mean, differences, q.stride(0), q.stride(1), num_queries, D=head_dim, BLOCK=64)
    rows = torch.empty(num_heads, count, dtype=torch.int32, device=q.device)
    top_k.select_largest(
        differences, top_k.on_device((count,) * num_heads, q.device), rows, 0, floor=0,
        backwards=False)
    return rows


def _mean(q: Tensor) -> Tensor:
    """Mean query of each head, [H, D] fp32. PyTorch's own mean over so many rows takes twice the
    workspace of all the rest for its partial sums."""
    num_queries, num_heads, head_dim = q.shape
    sums = torch.empty(triton.cdiv(num_queries, 128), num_heads, head_dim, dtype=torch.float32,
                       device=q.device)
    scout_kernels.sum_queries[(len(sums), num_heads)](
        q, sums, q.stride(0), q.stride(1), num_queries, num_heads, D=head_dim, BLOCK=128)
    return sums.sum(0) / num_queries


def _rotated(
    q: Tensor, rows: Tensor, start: int, rotary: QueryRotary, scale: float, tile_len: int,
    padded: int,
) -> _Scouts:
    """Rotate the rows for every zone, padded to a power of two and to as many as there are at a
    million keys also where a short segment has fewer: kernels are not compiled anew for it."""
    num_heads, count = rows.shape
    chunk_start = start // rotary.stride * rotary.stride
    zones = min(3, 1 + chunk_start // rotary.stride)
    queries = torch.empty(zones, num_heads, padded, q.shape[2], dtype=q.dtype, device=q.device)
    probe.rotate_listed[(padded // 16, num_heads, zones)](
        q, rotary.inv_freq, queries, rows, q.stride(0), q.stride(1), start, chunk_start,
        rotary.stride if zones > 1 else 0, rotary.clamp if zones > 2 else 0,
        scale * math.log2(math.e), count, num_heads, padded, HALF=q.shape[2] // 2, BLOCK=16)
    borders = max(0, chunk_start - rotary.stride) // tile_len, chunk_start // tile_len
    num_tiles = -(-(start + q.shape[0]) // tile_len)
    own = torch.arange(num_tiles - start // tile_len + 1, dtype=torch.int32, device=q.device)
    firsts = (own * tile_len - start % tile_len).expand(num_heads, -1).contiguous()
    ends = torch.searchsorted(rows, firsts, out_int32=True)
    return _Scouts(rows, queries, ends, start, (zones, num_tiles, *borders))


def _kept(
    selection: Selection, scouts: _Scouts, cache: PagedKV, block_table: Tensor, heads: slice,
    flags: Flags,
) -> Tensor:
    """Return log2 of the mass that the scouts keep, [heads here, RP]; base 2."""
    num_heads, padded, k = scouts.queries.shape[1], scouts.padded, cache.k
    num_here, zones = heads.stop - heads.start, scouts.zones
    kept = torch.empty(COLUMN_PARTS + 1, num_here, padded, dtype=torch.float32, device=k.device)
    constants = _constants(num_heads, k)
    few = min(COLUMN_ROWS, padded)
    scout_kernels.score_columns[(padded // few, num_here, COLUMN_PARTS)](
        scouts.queries, k, block_table, scouts.rows, selection.columns, kept,
        *k.stride()[:3], heads.start, num_heads, *zones, scouts.start, scouts.rows.shape[1],
        selection.columns.shape[1], padded, BM=few, BLOCK=COLUMN_BLOCK, **constants)
    width = selection.offsets.shape[1]
    scout_kernels.score_windows[(scouts.ends.shape[1] - 1, num_here)](
        scouts.queries, k, block_table, scouts.rows, scouts.ends, selection.offsets,
        flags.is_column, kept, *k.stride()[:3], heads.start, num_heads, *zones[1:], scouts.start,
        scouts.rows.shape[1], width, COLUMN_PARTS, padded, BM=WINDOW_ROWS,
        WIDTH=triton.next_power_of_2(width), **constants, num_stages=2)
    return _combined(kept, scouts)


def _score(
    scouts: _Scouts, cache: PagedKV, block_table: Tensor, heads: slice, flags: Flags,
    num_programs: int,
) -> Tensor:
    """Return the largest logits in all key tiles, without columns, [heads here, tiles, RP]; base
    2. Slots past the context may hold anything, and so may what is returned of their tiles."""
    num_tiles, k = scouts.zones[1], cache.k
    num_heads, padded, num_here = scouts.queries.shape[1], scouts.padded, heads.stop - heads.start
    missed = torch.empty(num_here, num_tiles, padded, dtype=torch.float32, device=k.device)
    if _on_hopper(scouts.queries, k):
        group = num_heads // k.shape[2]
        _hopper().score(
            scouts.queries, k, block_table, flags.is_column, missed,
            (heads.start // group, num_here // group), scouts.zones)
        return missed
    block = min(ROW_BLOCK, padded)
    programs = min(num_tiles, max(1, WAVES * num_programs // (padded // block * num_here)))
    scout_kernels.score_scouts[(programs, padded // block, num_here)](
        scouts.queries, k, block_table, flags.is_column, missed, *k.stride()[:3], heads.start,
        num_heads, *scouts.zones, padded, BM=block, **_constants(num_heads, k), num_warps=8,
        num_stages=3)
    return missed


def _constants(num_heads: int, k: Tensor) -> dict[str, Any]:
    """Return the kernels' constants; fp32, which only tests take, is multiplied exactly."""
    return {"GROUP": num_heads // k.shape[2], "P": k.shape[1], "D": k.shape[3],
            "PRECISION": "ieee" if k.dtype == torch.float32 else "tf32"}


def _combined(partial: Tensor, scouts: _Scouts) -> Tensor:
    """Combine the programs' log-sums, [programs, heads here, RP], to [heads here, RP]."""
    programs, num_here, padded = partial.shape
    lse = torch.empty(num_here, padded, dtype=torch.float32, device=partial.device)
    probe.combine_logs[(triton.cdiv(lse.numel(), 32),)](
        partial, lse, programs, lse.numel(), scouts.rows.shape[1], padded,
        NP=triton.next_power_of_2(programs), BLOCK=32)
    return lse


def _on_hopper(queries: Tensor, k: Tensor) -> bool:
    """Return whether Hopper's kernel takes the rotated scouts, [zones, H, RP, D]."""
    return k.is_cuda and bool(_hopper().supports(queries, k, queries.shape[2]))


def _hopper() -> ModuleType:
    """Import Gluon's kernels with the first CUDA tensor: they cannot be interpreted."""
    from longspan.ops.select import hopper_scouts

    return hopper_scouts


def _flags(selection: Selection, heads: slice, num_tiles: int) -> Flags:
    """Return what the rows of some heads keep."""
    offsets, columns = selection.offsets[heads], selection.columns[heads]
    tile_len = selection.tile_len
    is_window = columns.new_zeros(len(offsets), num_tiles, dtype=torch.int8)
    is_window.scatter_(1, (-offsets // tile_len).clamp(min=0), 1)  # gap 0 is always one
    return Flags(is_window, column_flags(columns, num_tiles, tile_len))


def column_flags(columns: Tensor, num_tiles: int, tile_len: int) -> Tensor:
    """Return which keys are columns, [H, (tiles + 1) * P] int8; the last tile takes the padding.
    columns: [H, V]."""
    is_column = columns.new_zeros(len(columns), (num_tiles + 1) * tile_len, dtype=torch.int8)
    return is_column.scatter_(1, columns.where(columns >= 0, num_tiles * tile_len), 1)
