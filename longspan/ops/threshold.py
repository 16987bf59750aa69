"""The k largest of many non-negative numbers for each head, in ascending order of index, in Triton.

No sort: bits of non-negative fp32 numbers are ordered like the numbers, so the k-th largest is
found digit by digit (radix selection), and what lies above is compacted by prefix sums. Among equal
numbers at the threshold the first ones are taken. Zeros are never counted one by one: where fewer
than k numbers are above zero, the threshold is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from call to call, and pointers into the middle of tensors: kernels are not
# compiled anew for their values.
_INTS = ["forced", "floor"]
_SLICES = ["budgets"]
LEVELS = 3
"""Digits: the 8 exponent bits, then 12 and 11 bits of the mantissa."""
BINS = 256 + 4096 + 2048
"""Counters of all three levels, for each head."""


@triton.jit
def _load_ranked(values, head, i, size, forced, REVERSED: tl.constexpr):
    """Bits of the numbers at i; the first ``forced`` (last ones, if reversed) rank above all."""
    rank = size - 1 - i if REVERSED else i
    x = tl.load(values + head.to(tl.int64) * size + i, mask=i < size, other=0.0)
    x = tl.where(rank < forced, 2e6 - rank.to(tl.float32), x)
    return tl.where(i < size, x.to(tl.int32, bitcast=True), -1)


@triton.jit
def _digit(counts, k, NUM: tl.constexpr):
    """The bin that holds the k-th largest, and how many of that bin are wanted.

    Without k entries in all bins: -1, and how many are missing.
    """
    digit = tl.arange(0, NUM)
    count = tl.load(counts + digit)
    total = tl.sum(count, 0)
    at_least = total - tl.cumsum(count, 0) + count
    found = tl.max(tl.where(at_least >= k, digit, -1), 0)
    above = tl.where(found < 0, total, tl.sum(tl.where(digit > found, count, 0), 0))
    return found, k - above


@triton.jit
def _prefix(counts, k, DIGITS: tl.constexpr):
    """Leading digits of the k-th largest number (-1: it is zero), and how many are wanted of the
    numbers that share them."""
    prefix, k = _digit(counts, k, 256)
    if DIGITS > 1:
        digit, inner = _digit(counts + 256, k, 4096)
        k = tl.where(prefix < 0, k, inner)
        prefix = tl.where(prefix < 0, prefix, (prefix << 12) | digit)
    if DIGITS > 2:
        digit, inner = _digit(counts + 256 + 4096, k, 2048)
        k = tl.where(prefix < 0, k, inner)
        prefix = tl.where(prefix < 0, prefix, (prefix << 11) | digit)
    return prefix, k


@triton.jit
def _budget(budgets, head, size, floor):
    return tl.minimum(tl.maximum(tl.load(budgets + head), floor), size)


@triton.jit(do_not_specialize=_INTS, do_not_specialize_on_alignment=_SLICES)
def count_digits(
    values, counts, budgets, size, forced, floor, BINS: tl.constexpr, LEVEL: tl.constexpr,
    REVERSED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """Histogram of digit ``LEVEL`` of the numbers that share the digits before it.

    values: [heads, size]; counts: [heads, BINS], zero before level 0. Grid (size / BLOCK, heads).
    """
    head = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = _load_ranked(values, head, i, size, forced, REVERSED)
    counts += head * BINS
    if LEVEL == 0:
        digit = tl.arange(0, 256)
        found = tl.histogram(tl.maximum(bits, 0) >> 23, 256, mask=bits > 0)
        tl.atomic_add(counts + digit, found, mask=found > 0, sem="relaxed")
    else:
        prefix, _ = _prefix(counts, _budget(budgets, head, size, floor), LEVEL)
        if LEVEL == 1:
            place, shared = 256 + ((bits >> 11) & 0xFFF), bits >> 23
        else:
            place, shared = 256 + 4096 + (bits & 0x7FF), bits >> 11
        tl.atomic_add(counts + place, 1, mask=(bits > 0) & (shared == prefix), sem="relaxed")


@triton.jit(do_not_specialize=_INTS, do_not_specialize_on_alignment=_SLICES)
def count_selected(
    values, counts, budgets, block_counts, size, forced, floor, BINS: tl.constexpr,
    REVERSED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """How many numbers of each block lie above the threshold and at it.

    block_counts: [heads, 2, blocks]. Grid (blocks, heads).
    """
    head, block = tl.program_id(1), tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    bits = _load_ranked(values, head, i, size, forced, REVERSED)
    threshold, _ = _prefix(counts + head * BINS, _budget(budgets, head, size, floor), 3)
    threshold = tl.maximum(threshold, 0)
    target = block_counts + head * 2 * tl.num_programs(0) + block
    tl.store(target, tl.sum((bits > threshold).to(tl.int32), 0))
    tl.store(target + tl.num_programs(0), tl.sum((bits == threshold).to(tl.int32), 0))


@triton.jit(do_not_specialize=[*_INTS, "stride_out"],
            do_not_specialize_on_alignment=[*_SLICES, "out"])
def write_selected(
    values, counts, budgets, block_counts, out, stride_out, size, forced, floor,
    BINS: tl.constexpr, REVERSED: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr,
) -> None:
    """Indices of the selected numbers, ascending; if reversed, ``size - 1 - index``, descending.

    out: [heads, >= k], its padding left alone. Grid (blocks, heads).
    """
    head, block, num_blocks = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    bits = _load_ranked(values, head, i, size, forced, REVERSED)
    threshold, wanted = _prefix(counts + head * BINS, _budget(budgets, head, size, floor), 3)
    threshold = tl.maximum(threshold, 0)
    other = tl.arange(0, NB)
    source = block_counts + head * 2 * num_blocks + other
    above = tl.sum(tl.load(source, mask=other < block, other=0), 0)
    equal = tl.sum(tl.load(source + num_blocks, mask=other < block, other=0), 0)
    is_equal = bits == threshold
    rank = equal + tl.cumsum(is_equal.to(tl.int32), 0)
    chosen = (bits > threshold) | (is_equal & (rank <= wanted))
    place = above + tl.minimum(equal, wanted) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    index = size - 1 - i if REVERSED else i
    tl.store(out + head.to(tl.int64) * stride_out + place, index.to(out.dtype.element_ty),
             mask=chosen)


@triton.jit(do_not_specialize=["width", "num_tiles", "floor"],
            do_not_specialize_on_alignment=[*_SLICES, "offsets"])
def choose_windows(
    sums, budgets, offsets, is_window, width, num_tiles, floor, P: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """The heaviest tile diagonals of each head, as window offsets; one program for each head.

    sums: [heads here, tiles], all of them in registers; offsets: [heads here, width], padded with
    P; is_window: [heads here, tiles] int8. Grid (heads here).
    """
    head = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    base = head.to(tl.int64) * num_tiles
    bits = tl.load(sums + base + i, mask=i < num_tiles, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where(i < num_tiles, bits, -1)
    k = _budget(budgets, head, num_tiles, floor)
    threshold = 0
    for bit in range(0, 31):
        raised = threshold | (1 << (30 - bit))
        threshold = tl.where(tl.sum((bits >= raised).to(tl.int32), 0) >= k, raised, threshold)
    is_equal = bits == threshold
    wanted = k - tl.sum((bits > threshold).to(tl.int32), 0)
    chosen = (bits > threshold) | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= wanted))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    target = offsets + head.to(tl.int64) * width
    tl.store(target + i, P + tl.zeros_like(i).to(tl.int64), mask=(i >= k) & (i < width))
    tl.store(target + place, -(i.to(tl.int64) * P), mask=chosen)
    tl.store(is_window + base + i, chosen.to(tl.int8), mask=i < num_tiles)


@triton.jit(do_not_specialize=["width", "size", "floor"], do_not_specialize_on_alignment=_SLICES)
def coalesce(distances, budgets, starts, num_starts, width, size, floor, P: tl.constexpr) -> None:
    """Windows that cover the diagonals of one head, farthest first (`select.coalesce_windows`).

    distances, starts: [heads here, width], distances descending. Grid (heads here).
    """
    head = tl.program_id(0)
    k = _budget(budgets, head, size, floor)
    base = head.to(tl.int64) * width
    distance = tl.load(distances + base)
    range_end = P - distance
    tl.store(starts + base, range_end - P)
    count = 1
    for i in range(1, k):
        end = P - tl.load(distances + base + i)
        is_new = end > range_end
        range_end = tl.where(is_new, tl.maximum(end, range_end + P), range_end)
        tl.store(starts + base + count, range_end - P, mask=is_new)
        count += is_new.to(tl.int32)
    tl.store(num_starts + head, count)


@triton.jit(do_not_specialize=["width", "stride_out"], do_not_specialize_on_alignment=["offsets"])
def reverse_windows(
    starts, num_starts, offsets, width, stride_out, P: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """starts [heads here, width] in reverse, padded with P. Grid (stride_out / BLOCK, heads)."""
    head = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(num_starts + head)
    start = tl.load(starts + head.to(tl.int64) * width + count - 1 - i, mask=i < count, other=P)
    tl.store(offsets + head.to(tl.int64) * stride_out + i, start.to(tl.int64), mask=i < stride_out)
