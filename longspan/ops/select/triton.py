"""Vertical-slash selection on the device: `select.select_vertical_slash` in Triton.

Same rules and results as `select`, which is the specification. The host only launches: shapes come
from the budget and from lengths it knows, so nothing waits for the device. Two passes of the probe
rows over the keys, and no score map: pass 1 gives each row's softmax sum and its mass in each key
tile, hence the windows and the tiles worth a look; pass 2 looks for columns in those, and
`top_k` takes the largest.

Heads are taken as many at a time as the workspace allows, so that all of it stays within 64 MiB
for 28 query heads, 4 KV heads and 1,048,576 keys with 128 probe rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from longspan.ops.select import top_k, triton_keys, triton_scouts
from longspan.ops.select import triton_tiles as probe
from longspan.ops.select.probes import PAPER_TILE_LEN, Probe, near_tiles, place_probes
from longspan.ops.select.triton_call import Call, Heads, Probes
from longspan.ops.tiles.splits import num_sms
from longspan.ops.types import Budget, PagedKV, QueryRotary, Selection

WORKSPACE_BYTES = 56 << 20
"""For masses of key tiles, then for sums of columns."""
ROW_BLOCK = 128
"""Probe rows in one matrix product of pass 1."""
ROWS_AT_ONCE = 512
"""Probe rows that a program keeps in shared memory (D = 128, bf16: 128 KiB)."""
DIAGONAL_HEADS = 2
"""Heads that a program of pass 2 takes at a time in paper mode: token diagonals need registers."""
MAX_ROWS = 128
"""Probe rows of one head."""
SHARED_BYTES = 204_800
"""Shared memory that a program of the passes takes at D = 128 and P = 128, and a little more."""
COLUMN_TILES = 32
"""Key tiles of one program of pass 2 in tile mode: few, since heads differ in their number."""
COLUMN_KEYS = 64
"""Keys at once in pass 2 in tile mode."""
INTERPRETED_PROGRAMS = 3


def supports(q: Tensor, cache: PagedKV, rotary: QueryRotary, cached_len: int,
             budget: Budget) -> bool:
    """Return whether the kernels take these inputs; otherwise `select` does. q: [T, H, D]."""
    return (0 < _most_rows(budget) <= MAX_ROWS
            and supports_shapes(q, cache, rotary, cached_len))


def supports_shapes(q: Tensor, cache: PagedKV, rotary: QueryRotary, cached_len: int) -> bool:
    """Return whether the kernels take these queries and keys, whatever the budget.

    q: [T, H, D]. Tiles must be powers of two and lie in one zone each; GPUs need the shared memory
    of Hopper.
    """
    if q.is_cuda and _shared_bytes(q.device) < SHARED_BYTES:
        return False
    tile_len, num_kv_heads, head_dim = cache.k.shape[1:]
    dtypes = (torch.bfloat16, torch.float16) if q.is_cuda else (torch.float32, torch.bfloat16)
    return (q.dtype == cache.k.dtype and q.dtype in dtypes and q.stride(-1) == 1
            and cache.k.stride(-1) == 1 and head_dim in (16, 32, 64, 128)
            and tile_len in (16, 32, 64, 128) and q.shape[1] % num_kv_heads == 0
            and (rotary.stride % tile_len == 0 or cached_len + q.shape[0] <= rotary.stride))


def select_vertical_slash(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, budget: Budget,
) -> Selection:
    """See `select.select_vertical_slash`. Equal sums at a budget's edge go to the lower index.

    q: [T, H, D] not rotated, all in one DCA chunk. Inputs are those that `supports` accepts.
    """
    (selection,) = select_several(q, cache, block_table, cached_len, rotary, scale, [budget])
    if budget.mode == "paper" or budget.num_scouts == 0:
        return selection
    return triton_scouts.add_scouts(selection, q, cache, block_table, cached_len, rotary, scale,
                                    budget, _device_programs(q.device))


def select_several(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, budgets: Sequence[Budget],
) -> list[Selection]:
    """See `select.select_several`. Pass 1 is made once for all of them in tile mode."""
    first_call = _prepare(q, cache, block_table, cached_len, rotary, scale, budgets[0])
    calls = [first_call._replace(budget=budget) for budget in budgets]
    is_tiles = budgets[0].mode == "tile"
    call = calls[0]
    outs = [(torch.full((call.num_heads, min(max(each.budget.vertical), call.context_len)), -1,
                        dtype=torch.int64, device=q.device),
             torch.empty(call.num_heads, _num_windows(each), dtype=torch.int64, device=q.device))
            for each in calls]
    num_kv_heads = cache.k.shape[2]
    bytes_per_head = _tile_bytes(call) if is_tiles else 8 * call.context_len
    at_once = max(1, min(num_kv_heads, WORKSPACE_BYTES // (bytes_per_head * call.group)))
    for first in range(0, num_kv_heads, at_once):
        heads = Heads(first, min(at_once, num_kv_heads - first))
        if is_tiles:
            _choose_tiles(calls, heads, outs)
        else:
            for each, (columns, offsets) in zip(calls, outs, strict=True):
                _choose_paper(each, heads, columns, offsets)
    return [Selection(columns, offsets, call.tile_len if is_tiles else PAPER_TILE_LEN,
                      aligned=is_tiles, max_columns=each.max_columns,
                      near_tiles=near_tiles(each.budget, rotary, call.context_len, call.tile_len))
            for each, (columns, offsets) in zip(calls, outs, strict=True)]


def _prepare(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, budget: Budget,
) -> Call:
    """Place the probe rows and rotate them for every zone."""
    num_queries, num_heads, head_dim = q.shape
    tile_len = cache.k.shape[1]
    probes = _place_probes(cached_len, num_queries, tile_len, budget)
    padded = max(16, triton.next_power_of_2(_most_rows(budget)))
    chunk_start = cached_len // rotary.stride * rotary.stride
    zones = min(3, 1 + chunk_start // rotary.stride)
    queries = torch.empty(zones, num_heads, padded, head_dim, dtype=q.dtype, device=q.device)
    probe.rotate_probes[(padded // 16, num_heads, zones)](
        q, rotary.inv_freq, queries, q.stride(0), q.stride(1), cached_len, chunk_start,
        rotary.stride if zones > 1 else 0, rotary.clamp if zones > 2 else 0,
        scale * math.log2(math.e), *probes, num_heads, padded, HALF=head_dim // 2, BLOCK=16)
    return Call(queries, cache, block_table, budget, probes, cached_len + num_queries,
                 max(0, chunk_start - rotary.stride) // tile_len, chunk_start // tile_len)


def _place_probes(start: int, num_queries: int, tile_len: int, budget: Budget) -> Probes:
    last, *more = place_probes(start, num_queries, tile_len, budget)
    strided = more[0] if more else Probe(start, 1, 0)
    return Probes(last.num_rows, last.first, last.step, strided.first, strided.step,
                   last.num_rows + strided.num_rows)


def _most_rows(budget: Budget) -> int:
    return budget.probe_last + (budget.probe_strided if budget.mode == "tile" else 0)


def _own(call: Call, heads: Heads) -> slice:
    """Return the query heads of these KV heads."""
    return slice(heads.first * call.group, (heads.first + heads.number) * call.group)


def _num_windows(call: Call) -> int:
    """Return the width of the offsets: known from the budget alone, so some of it may be
    padding."""
    if call.budget.mode == "tile":
        wanted = -(-max(call.budget.slash) // call.tile_len)
        return min(call.num_tiles, max(_forced_tiles(call), wanted))
    return min(max(1, *call.budget.slash), call.context_len)


def _forced_tiles(call: Call) -> int:
    return 1 + -(-call.budget.local // call.tile_len)


def _tile_bytes(call: Call) -> int:
    """Return the workspace of one query head in pass 1: masses of rows in tiles."""
    return 4 * call.num_tiles * call.padded_rows


def _column_bytes(call: Call) -> int:
    """Return the workspace of one query head in pass 2: sums of columns, and lists of the
    largest."""
    return 4 * _column_tiles(call) * call.tile_len + 36 * max(call.max_columns)


def _column_tiles(call: Call) -> int:
    """Return the largest number of tiles that columns of one head are looked for in."""
    return min(call.num_tiles, max(call.budget.vertical))


# -- tile mode --------------------------------------------------------------------------------


def _choose_tiles(
    calls: Sequence[Call], heads: Heads, outs: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Fill the rows of these heads for every call, which differ in their budgets. outs: columns [H,
    V] and offsets [H, W] of each."""
    call = calls[0]
    device, num_tiles, rows = call.queries.device, call.num_tiles, call.padded_rows
    num_heads = heads.number * call.group
    own = _own(call, heads)
    probes = {"ROWS": call.group * rows, "RP": rows, "P": call.tile_len, "BLOCK": 64,
              "num_warps": max(1, rows // 8)}
    grid = triton.cdiv(num_tiles, 64), num_heads
    masses = torch.empty(num_heads * num_tiles * rows, dtype=torch.float32, device=device)
    lse = _pass_one(call, heads, masses)
    diagonals = torch.empty(num_heads, num_tiles, dtype=torch.float32, device=device)
    probe.diagonal_masses[grid](masses, lse, diagonals, num_tiles, *call.probes, **probes)
    is_windows, weights = [], []
    for each, (columns, offsets) in zip(calls, outs, strict=True):
        is_window = torch.empty(num_heads, num_tiles, dtype=torch.int8, device=device)
        top_k.choose_windows[(num_heads,)](
            diagonals, _window_budgets(each)[own], offsets[own], is_window, offsets.shape[1],
            num_tiles, _forced_tiles(each), P=call.tile_len,
            BLOCK=max(1024, triton.next_power_of_2(num_tiles)), num_warps=16)
        is_windows.append(is_window)
        if columns.shape[1]:
            sums = torch.empty(num_heads, num_tiles, dtype=torch.float32, device=device)
            probe.free_masses[grid](
                masses, lse, is_window, sums, num_tiles, *call.probes, **probes)
            weights.append(sums)
    del masses, diagonals
    wide = [item for item in zip(calls, outs, is_windows, strict=True) if item[1][0].shape[1]]
    for (each, (columns, _), is_window), sums in zip(wide, weights, strict=True):
        rounds = -(-num_heads * _column_bytes(each) // WORKSPACE_BYTES)
        at_once = max(1, -(-num_heads // rounds))
        for first in range(0, num_heads, at_once):
            part = slice(first, first + at_once)
            part_weights = sums[part].clone()  # at a multiple of 16 bytes, as kernels expect
            _choose_columns(each, own.start + first, lse[first * rows :], is_window[part],
                            part_weights, columns[own][part])


def _choose_columns(
    call: Call, first_head: int, lse: Tensor, is_window: Tensor, weights: Tensor,
    columns: Tensor,
) -> None:
    """Choose the heaviest keys of the heaviest tiles, for the query heads from ``first_head`` on.
    weights: [heads here, tiles], changed; columns: [heads here, V]."""
    num_heads, device, width = len(columns), columns.device, _column_tiles(call)
    budgets = top_k.on_device(call.max_columns, device)[first_head : first_head + num_heads]
    sink = min(call.budget.sink, call.context_len)
    tiles = torch.empty(num_heads, width, dtype=torch.int32, device=device)
    top_k.select_largest(
        weights, budgets, tiles, -(-sink // call.tile_len), floor=0, backwards=False)
    blocks, is_masked = torch.empty_like(tiles), torch.empty_like(tiles, dtype=torch.int8)
    triton_keys.find_blocks[(triton.cdiv(width, 64), num_heads)](
        tiles, budgets, call.block_table, is_window, blocks, is_masked, width, call.num_tiles,
        *call.probes, RP=call.padded_rows, P=call.tile_len, BLOCK=64)
    sums = torch.empty(num_heads, width * call.tile_len, dtype=torch.float32, device=device)
    k = call.cache.k
    triton_keys.tile_columns[(num_heads, triton.cdiv(width, COLUMN_TILES))](
        call.queries, k, lse, is_window, tiles, blocks, is_masked, budgets, sums, *k.stride()[:3],
        first_head, call.num_heads, *call.zones, width, call.context_len, *call.probes,
        GROUP=call.group, WIDTH=triton.next_power_of_2(width), KEYS=min(COLUMN_KEYS, call.tile_len),
        **_constants(call) | {"num_warps": 4, "num_stages": 5})  # fewer stages load keys too late
    top_k.select_largest(sums, budgets, columns, sink, floor=0, backwards=False)
    top_k.place_columns[(triton.cdiv(columns.shape[1], 1024), num_heads)](
        columns, tiles, columns.shape[1], width, P=call.tile_len, BLOCK=1024)


def _window_budgets(call: Call) -> Tensor:
    tiles = tuple(-(-tokens // call.tile_len) for tokens in call.budget.slash)
    return top_k.on_device(tiles, call.queries.device)


# -- paper mode -------------------------------------------------------------------------------


def _choose_paper(call: Call, heads: Heads, columns: Tensor, offsets: Tensor) -> None:
    """Fill the rows of these heads. columns: [H, V]; offsets: [H, W]."""
    device, size, budget = call.queries.device, call.context_len, call.budget
    num_heads = heads.number * call.group
    own = _own(call, heads)
    slash = top_k.on_device(budget.slash, device)[own]
    lse = _pass_one(call, heads, None)
    column_sums = torch.empty(num_heads, size, dtype=torch.float32, device=device)
    diagonals = torch.zeros(num_heads, size, dtype=torch.float32, device=device)
    groups = triton.cdiv(call.group, DIAGONAL_HEADS)
    k = call.cache.k
    triton_keys.key_masses[(_programs(call, heads, groups), groups, heads.number)](
        call.queries, k, call.block_table, lse, column_sums, diagonals, *k.stride()[:3],
        heads.first, call.num_heads, *call.zones, size, *call.probes,
        GROUP=call.group, QG=min(call.group, DIAGONAL_HEADS), **_constants(call))
    top_k.select_largest(
        column_sums, top_k.on_device(budget.vertical, device)[own], columns[own], budget.sink,
        floor=0, backwards=False)
    width = min(max(1, *budget.slash), size)
    distances = torch.empty(num_heads, width, dtype=torch.int32, device=device)
    top_k.select_largest(diagonals, slash, distances, budget.local, floor=1, backwards=True)
    top_k.place_diagonals[(triton.cdiv(offsets.shape[1], 1024), num_heads)](
        distances, slash, offsets[own], width, size, 1, offsets.shape[1], P=PAPER_TILE_LEN,
        BLOCK=1024)


# -- pass 1 -----------------------------------------------------------------------------------


def _pass_one(call: Call, heads: Heads, masses: Tensor | None) -> Tensor:
    """Compute log2 of each probe row's whole mass, [heads here * RP]; fills ``masses`` if given."""
    k, rows = call.cache.k, call.group * call.padded_rows
    num_blocks = triton.cdiv(rows, ROW_BLOCK)
    groups = triton.cdiv(num_blocks, ROWS_AT_ONCE // ROW_BLOCK)
    programs = _programs(call, heads, groups)
    size = heads.number * rows
    sink_tiles = 0 if masses is None else -(
        -min(call.budget.sink, call.context_len) // call.tile_len)
    clear = _clear_tiles(call, sink_tiles) if masses is not None else None
    parts = programs + (0 if clear is None else _hopper().num_parts(call.queries, k, heads.number))
    partial = torch.empty(parts, size, dtype=torch.float32, device=k.device)
    lse = torch.empty(size, dtype=torch.float32, device=k.device)
    blocks = triton.next_power_of_2(triton.cdiv(num_blocks, groups))
    probe.tile_masses[(programs, groups, heads.number)](
        call.queries, k, call.block_table, partial if masses is None else masses, partial,
        *k.stride()[:3], heads.first, call.num_heads, *call.zones, sink_tiles, call.mask_from,
        call.budget.sink, *call.probes, ROWS=rows, QN=blocks, BM=ROW_BLOCK,
        WITH_MAP=masses is not None, CLEAR=clear is None, **_constants(call))
    if clear is not None and masses is not None:
        _hopper().pass_one(
            call.queries, k, call.block_table, masses, partial, programs, heads, call.zones, clear)
    probe.combine_logs[(triton.cdiv(size, 32),)](
        partial, lse, parts, size, call.probes.num_rows, call.padded_rows,
        NP=triton.next_power_of_2(parts), BLOCK=32)
    return lse


def _clear_tiles(call: Call, first: int) -> tuple[int, int] | None:
    """Return the key tiles [low, high) that need no mask, where Hopper's kernels take them; else
    None."""
    if not call.queries.is_cuda or first >= call.mask_from:
        return None
    can = _hopper().supports(call.queries, call.cache.k, call.padded_rows)
    return (first, call.mask_from) if can else None


def _hopper() -> ModuleType:
    """Import Gluon's kernels with the first CUDA tensor: they cannot be interpreted."""
    from longspan.ops.select import hopper_tiles

    return hopper_tiles


def _programs(call: Call, heads: Heads, groups: int) -> int:
    """Return the number of programs along the keys: together one wave over the whole device."""
    programs = _device_programs(call.cache.k.device) // (heads.number * groups)
    return min(call.num_tiles, max(1, programs))


def _constants(call: Call) -> dict[str, Any]:
    """Return the kernels' constants; fp32, which only tests take, is multiplied exactly."""
    return {"RP": call.padded_rows, "P": call.tile_len, "D": call.cache.k.shape[3], "num_stages": 3,
            "PRECISION": "ieee" if call.cache.k.dtype == torch.float32 else "tf32",
            "num_warps": 8}


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


@functools.cache
def _device_programs(device: torch.device) -> int:
    """Return how many programs run at once: one on each multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return num_sms(device)
