"""The k largest of many non-negative numbers for each head, in ascending order of index, in Triton.

No sort. Bits of non-negative fp32 numbers are ordered like the numbers, so a k-th largest is found
bit by bit, by counting what reaches a candidate. One program does that for up to some 10,000
numbers at once. Of a million they are first made few:

1. Deal the numbers into groups and take the largest of each. The k-th largest of those is a lower
   bound of the k-th largest of all.
2. List what lies above the bound, and of what equals it only as much as is then missing, in order
   of index: hardly more than k numbers, also where all are equal.
3. Take the k largest of the list.

Should most of what is above the bound lie in few groups, there may be more than the list can hold.
It is then not used: one program walks all numbers of the head, slowly. Among equal numbers at the
threshold the first ones are taken.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that change from call to call, and pointers into the middle of tensors: kernels are not
# compiled anew for their values.
_SLICES = ["budgets"]
MOST_MAXIMA, MOST_LISTED = 32_768, 16_384
"""Numbers that a program keeps in registers; further ones it reads once for each bit."""
BLOCK = 4096
"""Numbers that a program counts or lists at once."""
LEAST_GROUPS = 1024
SHIFT = tl.constexpr(404)
"""Places by which each row of numbers is turned before its columns make groups: else numbers that
repeat with a power of two would all meet in few groups. A multiple of 4: loads stay 16 bytes."""


@triton.jit
def _budget(budgets, head, size, floor):
    return tl.minimum(tl.maximum(tl.load(budgets + head), floor), size)


@triton.jit
def count_above(bits, source, length, limit, CHUNK: tl.constexpr):
    """Return how many of the numbers are above ``limit``: CHUNK ones in registers, the rest in
    memory."""
    i = tl.arange(0, CHUNK)
    count = tl.sum((bits > limit).to(tl.int32), 0)
    if source is not None:
        for start in range(CHUNK, length, CHUNK):
            more = tl.load(source + start + i, mask=start + i < length, other=-1)
            count += tl.sum((more > limit).to(tl.int32), 0)
    return count


@triton.jit
def threshold_of(bits, source, length, k, most, CHUNK: tl.constexpr):
    """Find a number that at least k of ``length`` numbers reach. At most ``most`` numbers reach it,
    or it is the k-th largest.

    bits: the first CHUNK of them, -1 for padding; source: all, None if those are all.
    """
    threshold, reached, bit = 0, length, 30
    while (bit >= 0) & (reached > most):
        raised = threshold | (1 << bit)
        count = count_above(bits, source, length, raised - 1, CHUNK)
        threshold = tl.where(count >= k, raised, threshold)
        reached = tl.where(count >= k, count, reached)
        bit -= 1
    return threshold


@triton.jit
def chosen_of(bits, threshold, wanted):
    """Mark what is above the threshold, and the first ``wanted`` numbers equal to it; also count
    those up to each number. One scan makes two counts, 16 bits each."""
    is_above, is_equal = bits > threshold, bits == threshold
    counts = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
    equal = counts >> 16
    place = (counts & 0xFFFF) + tl.minimum(equal, tl.maximum(wanted, 0))
    return is_above | (is_equal & (equal <= wanted)), place


@triton.jit(do_not_specialize=["groups"])
def group_maxima(
    values, maxima, size, groups, stride_maxima, ROWS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Find the largest of each group. A group is a column of the numbers laid out in rows of
    ``groups``.

    values: [heads, size] bits; maxima: [heads, groups], a power of two. Grid (groups / BLOCK,
    heads).
    """
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -1, tl.int32)
    for first in range(0, size, groups * ROWS):
        row = tl.arange(0, ROWS)[:, None] + first // groups
        i = row * groups + ((column[None, :] + row * SHIFT) & (groups - 1))
        i = tl.max_contiguous(tl.multiple_of(i, (1, 4)), (1, 4))
        bits = tl.load(values + head * size + i, mask=i < size, other=-1)
        best = tl.maximum(best, tl.max(bits, 0))
    tl.store(maxima + head * stride_maxima + column, best)


@triton.jit(do_not_specialize=["groups", "floor"], do_not_specialize_on_alignment=_SLICES)
def lower_bounds(
    maxima, bounds, budgets, groups, stride_maxima, size, floor, CHUNK: tl.constexpr
) -> None:
    """Find a bound for each head that k groups reach, and hardly more than k. bounds: [heads]. Grid
    (heads)."""
    head = tl.program_id(0)
    k = _budget(budgets, head, size, floor)
    i = tl.arange(0, CHUNK)
    source = maxima + head.to(tl.int64) * stride_maxima
    bits = tl.load(source + i, mask=i < groups, other=-1)
    tl.store(bounds + head, threshold_of(bits, source, groups, k, k + k // 16, CHUNK))


@triton.jit
def count_reached(values, bounds, block_counts, size, BLOCK: tl.constexpr) -> None:
    """Count the numbers of each block that are above the bound, and those equal to it.

    block_counts: [heads, 2, blocks]. Grid (blocks, heads).
    """
    head = tl.num_programs(1) - 1 - tl.program_id(1)  # what was read last may still be in L2
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(values + head.to(tl.int64) * size + i, mask=i < size, other=-1)
    bound = tl.load(bounds + head)
    target = block_counts + head * 2 * tl.num_programs(0) + block
    tl.store(target, tl.sum((bits > bound).to(tl.int32), 0))
    tl.store(target + tl.num_programs(0), tl.sum((bits == bound).to(tl.int32), 0))


@triton.jit
def _totals(block_counts, head, block, num_blocks, k, NB: tl.constexpr):
    """Return how many numbers are above the bound before ``block`` and in all, the same for those
    equal to it, and how many of the latter are wanted."""
    i = tl.arange(0, NB)
    source = block_counts + head * 2 * num_blocks + i
    above = tl.load(source, mask=i < num_blocks, other=0)
    equal = tl.load(source + num_blocks, mask=i < num_blocks, other=0)
    all_above = tl.sum(above, 0)
    return (tl.sum(tl.where(i < block, above, 0), 0), all_above,
            tl.sum(tl.where(i < block, equal, 0), 0), tl.sum(equal, 0),
            tl.maximum(k - all_above, 0))


@triton.jit(do_not_specialize=["floor"], do_not_specialize_on_alignment=_SLICES)
def list_reached(
    values, bounds, block_counts, budgets, found, capacity, size, floor,
    BLOCK: tl.constexpr, NB: tl.constexpr,
) -> None:
    """List the numbers above the bound and the wanted ones equal to it, ascending by index.

    found: [heads, 2, capacity] bits and indices; what goes beyond is dropped. Grid (blocks, heads).
    """
    head, block, num_blocks = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    k = _budget(budgets, head, size, floor)
    above, _, equal, _, wanted = _totals(block_counts, head, block, num_blocks, k, NB)
    here = block_counts + head * 2 * num_blocks + block
    if (tl.load(here) > 0) | ((tl.load(here + num_blocks) > 0) & (equal < wanted)):
        i = block * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(values + head.to(tl.int64) * size + i, mask=i < size, other=-1)
        chosen, place = chosen_of(bits, tl.load(bounds + head), wanted - equal)
        place += above + tl.minimum(equal, wanted) - 1
        target = found + head.to(tl.int64) * 2 * capacity + place
        tl.store(target, bits, mask=chosen & (place < capacity))
        tl.store(target + capacity, i, mask=chosen & (place < capacity))


@triton.jit(do_not_specialize=["stride_out", "num_blocks", "floor"],
            do_not_specialize_on_alignment=[*_SLICES, "out"])
def write_largest(
    values, found, block_counts, budgets, out, stride_out, num_blocks, capacity, size, floor,
    REVERSED: tl.constexpr, NB: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """Write the indices of the k largest, ascending; if reversed, ``size - 1 - index``, descending.

    Of the list if it holds all that was found, otherwise of all numbers. out: [heads, >= k], its
    padding left alone. Grid (heads).
    """
    head = tl.program_id(0)
    k = _budget(budgets, head, size, floor)
    _, above, _, equal, wanted = _totals(block_counts, head, 0, num_blocks, k, NB)
    count = above + tl.minimum(equal, wanted)
    is_listed = (num_blocks > 0) & (count <= capacity)
    source, length = values + head.to(tl.int64) * size, size
    if is_listed:
        source, length = found + head.to(tl.int64) * 2 * capacity, count
    i = tl.arange(0, CHUNK)
    bits = tl.load(source + i, mask=i < length, other=-1)
    threshold = threshold_of(bits, source, length, k, k, CHUNK)
    wanted = k - count_above(bits, source, length, threshold, CHUNK)
    target = out + head.to(tl.int64) * stride_out
    for start in range(0, length, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        some = tl.load(source + entry, mask=entry < length, other=-1)
        chosen, place = chosen_of(some, threshold, wanted)
        index = tl.load(source + capacity + entry, mask=chosen & is_listed, other=0)
        index = tl.where(is_listed, index, entry)
        index = size - 1 - index if REVERSED else index
        tl.store(target + place - 1, index.to(out.dtype.element_ty), mask=chosen)
        target += tl.max(place, 0)
        wanted -= tl.sum((some == threshold).to(tl.int32), 0)


def select_largest(
    values: Tensor, budgets: Tensor, out: Tensor, forced: int, floor: int, backwards: bool
) -> None:
    """Select the indices of each head's largest values, ascending; backwards: as distances from the
    end.

    The first ``forced`` ones, or the last, rank above all others; ``values`` are changed so.
    values: [heads, S] fp32 >= 0, contiguous; budgets: [heads] int32 on the device, raised to
    ``floor`` and cut at S; out: [heads, >= k]. Nothing waits for the device. Workspace: 18 to 36
    bytes for each entry of ``out``.
    """
    (num_heads, size), width = values.shape, out.shape[1]
    if width == 0:
        return
    if forced > 0:
        ranks = _forced_ranks(min(forced, size), backwards, values.device)
        values[:, size - len(ranks) if backwards else 0 :][:, : len(ranks)] = ranks
    bits = values.view(torch.int32)
    groups = max(LEAST_GROUPS, triton.next_power_of_2(width + width // 2))
    capacity, blocks = groups // 2 * 3, triton.cdiv(size, BLOCK)
    if 2 * groups > size:  # one program for each head takes all of them
        capacity, blocks = 0, 0
    found = torch.empty(num_heads, 2, capacity, dtype=torch.int32, device=values.device)
    counts = torch.empty(num_heads, 2, blocks, dtype=torch.int32, device=values.device)
    num_counts = max(256, triton.next_power_of_2(blocks))
    if blocks > 0:
        bounds = torch.empty(num_heads, dtype=torch.int32, device=values.device)
        # Maxima are done with before the list that takes their place is written.
        group_maxima[(groups // 512, num_heads)](
            bits, found, size, groups, 2 * capacity, ROWS=16, BLOCK=512, num_warps=8)
        lower_bounds[(num_heads,)](found, bounds, budgets, groups, 2 * capacity, size, floor,
                                   CHUNK=min(MOST_MAXIMA, groups), num_warps=32)
        count_reached[(blocks, num_heads)](bits, bounds, counts, size, BLOCK=BLOCK, num_warps=8)
        list_reached[(blocks, num_heads)](
            bits, bounds, counts, budgets, found, capacity, size, floor, BLOCK=BLOCK,
            NB=num_counts, num_warps=8, maxnreg=64)
    write_largest[(num_heads,)](
        bits, found, counts, budgets, out, out.stride(0), blocks, capacity, size, floor,
        REVERSED=backwards, NB=num_counts, CHUNK=MOST_LISTED, BLOCK=2 * BLOCK, num_warps=32)


@functools.lru_cache(maxsize=1024)
def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return [n] int32, kept for each layer. From pinned memory, so that the host does not wait."""
    tensor = torch.tensor(values, dtype=torch.int32)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@functools.lru_cache(maxsize=64)
def _forced_ranks(count: int, backwards: bool, device: torch.device) -> Tensor:
    """Return what ranks above all sums, [count]: see `select`. Kept for each layer."""
    ranks = 2e6 - torch.arange(count, dtype=torch.float32, device=device)
    return ranks.flip(0) if backwards else ranks


@triton.jit(do_not_specialize=["width", "num_tiles", "forced"],
            do_not_specialize_on_alignment=[*_SLICES, "offsets"])
def choose_windows(
    sums, budgets, offsets, is_window, width, num_tiles, forced, P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Choose the heaviest tile diagonals of each head, as window offsets; the first ``forced`` ones
    lead.

    sums: [heads here, tiles] from `triton_tiles.diagonal_masses`, all of them in registers;
    offsets: [heads here, width], padded with P; is_window: [heads here, tiles] int8. Grid (heads
    here).
    """
    head = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    base = head.to(tl.int64) * num_tiles
    total = tl.load(sums + base + i, mask=i < num_tiles, other=0.0)
    total = tl.where(i < forced, 2e6 - i.to(tl.float32), total)
    bits = tl.where(i < num_tiles, total.to(tl.int32, bitcast=True), -1)
    k = _budget(budgets, head, num_tiles, forced)
    threshold = threshold_of(bits, None, num_tiles, k, k, BLOCK)
    wanted = k - count_above(bits, None, num_tiles, threshold, BLOCK)
    chosen, place = chosen_of(bits, threshold, wanted)
    target = offsets + head.to(tl.int64) * width
    tl.store(target + i, P + tl.zeros_like(i).to(tl.int64), mask=(i >= k) & (i < width))
    tl.store(target + place - 1, -(i.to(tl.int64) * P), mask=chosen)
    tl.store(is_window + base + i, chosen.to(tl.int8), mask=i < num_tiles)


@triton.jit(do_not_specialize=["width", "size", "floor", "stride_out"],
            do_not_specialize_on_alignment=[*_SLICES, "offsets"])
def place_diagonals(
    distances, budgets, offsets, width, size, floor, stride_out, P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Turn each head's distances [heads here, width], descending, into offsets, nearest first,
    padded with P. Grid (stride_out / BLOCK, heads here)."""
    head = tl.program_id(1)
    k = _budget(budgets, head, size, floor)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = distances + head.to(tl.int64) * width
    offset = -tl.load(source + k - 1 - i, mask=i < k, other=-P)
    tl.store(offsets + head.to(tl.int64) * stride_out + i, offset.to(tl.int64), mask=i < stride_out)


@triton.jit(do_not_specialize=["width", "num_tiles"], do_not_specialize_on_alignment=["columns"])
def place_columns(
    columns, tiles, width, num_tiles, P: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Turn indices of keys in listed tiles into key positions, in place.

    columns: [heads here, width] int64, padded with -1; tiles: [heads here, num_tiles] int32. Grid
    (width / BLOCK, heads here).
    """
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(columns + head * width + i, mask=i < width, other=-1)
    tile = tl.load(tiles + head * num_tiles + index // P, mask=index >= 0, other=0)
    tl.store(columns + head * width + i, tile.to(tl.int64) * P + index % P, mask=index >= 0)
