"""Work items, parts of the keys of each request that are computed apart, and their merge.

How many items a request gets follows from the real lengths of the whole batch, read on the device:
grids depend on shapes only (CUDA graphs), and a long request among short ones still fills the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.ops.tiles.triton import LN_2


def num_items(num_tiles: int, capacity: int, min_tiles: int) -> int:
    """Return the number of items of a request that is alone: `work_items` on the host."""
    return -(-num_tiles // max(-(-num_tiles // capacity), min_tiles))


@triton.jit
def work_items(
    counts, num_requests, capacity,
    TILE: tl.constexpr, REQUESTS: tl.constexpr, MIN_TILES: tl.constexpr,
):
    """Count key tiles and work items of each request, and find where its items end: three of
    [REQUESTS].

    Items of the batch have the same number of tiles, up to one: at most ``capacity`` + requests.
    """
    rows = tl.arange(0, REQUESTS)
    lens = tl.load(counts + rows, mask=rows < num_requests, other=0).to(tl.int32)
    tiles = (lens + TILE - 1) // TILE
    tiles_per_item = tl.maximum((tl.sum(tiles, 0) + capacity - 1) // capacity, MIN_TILES)
    items = (tiles + tiles_per_item - 1) // tiles_per_item
    return tiles, items, tl.cumsum(items, 0)


@triton.jit(do_not_specialize=["num_heads"])
def merge_items(
    parts, part_lse, counts, out, lse, num_heads, num_requests, capacity,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, REQUESTS: tl.constexpr, MIN_TILES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Merge all items of one request and query head into one row, with the LSE to base e; the heads
    of further rows are heads."""
    request = tl.program_id(1)
    _, items, ends = work_items(counts, num_requests, capacity, TILE, REQUESTS, MIN_TILES)
    is_request = tl.arange(0, REQUESTS) == request
    stop = tl.sum(tl.where(is_request, ends, 0), 0)
    start = stop - tl.sum(tl.where(is_request, items, 0), 0)
    _merge(parts, part_lse, out, lse, num_heads, request, start, stop, HEAD_DIM, ITEMS)


@triton.jit
def share_ends(
    counts, request, num_requests, programs,
    TILE: tl.constexpr, REQUESTS: tl.constexpr, MIN_TILES: tl.constexpr,
):
    """Find the programs whose shares hold the first and the last key tile of a request, and the
    number of its tiles.

    Shares are the tiles of all requests, one behind the other, in as many equal runs as have
    MIN_TILES: share p of n begins with tile total * p // n. None is empty, up to ``programs``.
    """
    rows = tl.arange(0, REQUESTS)
    lens = tl.load(counts + rows, mask=rows < num_requests, other=0).to(tl.int32)
    tiles = (lens + TILE - 1) // TILE
    total = tl.sum(tiles, 0)
    per_share = tl.maximum((total + programs - 1) // programs, MIN_TILES)
    used = tl.maximum((total + per_share - 1) // per_share, 1)
    begin = tl.sum(tl.where(rows < request, tiles, 0), 0)
    own = tl.sum(tl.where(rows == request, tiles, 0), 0)
    whole = tl.maximum(total, 1)
    return ((begin + 1) * used - 1) // whole, ((begin + own) * used - 1) // whole, own


@triton.jit(do_not_specialize=["num_heads"])
def merge_shares(
    parts, part_lse, counts, out, lse, num_heads, num_requests, programs,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, REQUESTS: tl.constexpr, MIN_TILES: tl.constexpr,
    PARTS: tl.constexpr, ITEMS: tl.constexpr,
):
    """Merge as `merge_items` does what the programs of `share_ends` gave: program p's PARTS parts
    of request r are those from (p + r) * PARTS on, which no other program or request has."""
    request = tl.program_id(1)
    first, last, tiles = share_ends(
        counts, request, num_requests, programs, TILE, REQUESTS, MIN_TILES)
    start = (first + request) * PARTS
    stop = tl.where(tiles > 0, (last + request + 1) * PARTS, start)
    _merge(parts, part_lse, out, lse, num_heads, request, start, stop, HEAD_DIM, ITEMS)


@triton.jit
def _merge(
    parts, part_lse, out, lse, num_heads, request, start, stop, HEAD_DIM: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Merge the parts [start, stop) of one request and this program's query head."""
    head = tl.program_id(0)
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
    place = out + (request.to(tl.int64) * num_heads + head) * HEAD_DIM
    tl.store(place + dims, (acc / total_or_1).to(out.dtype.element_ty))
    tl.store(lse + request * num_heads + head + tl.arange(0, 1), (top + tl.log2(total)) * LN_2)
