"""Products of a few rows with quantised weights (Triton): decode steps, which read weights once.

Weights come as they are stored and are multiplied in bf16; activations are not rounded. Each
program streams some outputs' weights, over all inputs or a part of them; parts are added up by a
second kernel, in their order. Grids depend on shapes alone: graph capture is safe.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.types import FP8_BLOCK, Fp8Weights, Int4Weights

MAX_ROWS = 16
INT4_ROWS = 64
"""Up to so many rows int4 is read as it is: more rows of fp8 have products of their own."""
COLUMNS = 32
"""Outputs of a program."""
DEPTH = 128
"""Inputs of a step, at most."""
PROGRAMS = 264
"""Inputs are parted until there are about so many programs: two for each processor of an H200."""
MIN_PART = 1_024
"""Inputs of a part, at least."""
STAGES, WARPS = 5, 4
SUM_TILE = 1_024
ROW_SCALES, BLOCK_SCALES = 0, 1


def fp8_linear(x: Tensor, weights: Fp8Weights, bias: Tensor | None) -> Tensor:
    """See `eager.fp8_linear`. x: [T, K] bf16, T <= `MAX_ROWS`."""
    num_columns, width = weights.values.shape
    call = _Call(x, num_columns, width, DEPTH)
    _few_fp8[call.grid](
        x, weights.values, weights.scales, call.parts, x.shape[0], num_columns, width,
        call.part_len, x.stride(0), weights.scales.stride(0), ROWS=MAX_ROWS, COLUMNS=COLUMNS,
        DEPTH=DEPTH, BLOCK=FP8_BLOCK, IS_BLOCKED=weights.is_blocked, num_warps=WARPS,
        num_stages=STAGES)
    return call.total(bias)


def int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None) -> Tensor:
    """See `eager.int4_linear`. x: [T, K] bf16, T <= `INT4_ROWS`."""
    num_columns, width = weights.shape
    depth = math.gcd(weights.group, DEPTH)
    call = _Call(x, num_columns, width, depth)
    order = weights.order
    _few_int4[call.grid](
        x, weights.packed, weights.scales, weights.zeros, x if order is None else order,
        call.parts, x.shape[0], num_columns, width, call.part_len, x.stride(0), weights.group,
        HAS_ORDER=order is not None, ROWS=max(MAX_ROWS, triton.next_power_of_2(len(x))),
        COLUMNS=COLUMNS, DEPTH=depth, num_warps=WARPS, num_stages=STAGES)
    return call.total(bias)


@cache
def supports_fp8(device: torch.device) -> bool:
    """Return whether kernels can read e4m3 there: from Ada on."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


class _Call:
    """Grid, partial sums and their total."""

    def __init__(self, x: Tensor, num_columns: int, width: int, depth: int) -> None:
        assert x.shape[0] <= INT4_ROWS and x.stride(1) == 1 and x.dtype == torch.bfloat16
        tiles = triton.cdiv(num_columns, COLUMNS)
        count = max(1, min(triton.cdiv(PROGRAMS, tiles), width // MIN_PART))
        self.part_len = triton.cdiv(triton.cdiv(width, count), depth) * depth
        count = triton.cdiv(width, self.part_len)
        self.grid = (tiles, count)
        self.parts = torch.empty(
            count, x.shape[0], num_columns, dtype=torch.float32, device=x.device)
        self._dtype = x.dtype

    def total(self, bias: Tensor | None) -> Tensor:
        """Add up the parts, and the bias."""
        count, num_rows, num_columns = self.parts.shape
        out = torch.empty(num_rows, num_columns, dtype=self._dtype, device=self.parts.device)
        if num_rows:
            _add_parts[(num_rows, triton.cdiv(num_columns, SUM_TILE))](
                self.parts, out if bias is None else bias, out, count, num_rows, num_columns,
                HAS_BIAS=bias is not None, TILE=SUM_TILE, num_warps=4)
        return out


@triton.jit
def _few_fp8(
    x, values, scales, parts, num_rows, num_columns, width, part_len, x_row, scale_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    IS_BLOCKED: tl.constexpr,
):
    """Multiply all rows with some columns, over a part of the inputs."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows, depths = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    is_row, is_column = rows < num_rows, columns < num_columns
    start = tl.program_id(1) * part_len
    stop = tl.minimum(start + part_len, width)
    row_places = x + rows[:, None] * x_row + depths[None, :]
    matrix = values + columns.to(tl.int64)[None, :] * width + depths[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(start, stop, DEPTH):
        is_depth = first + depths < stop
        part = tl.load(row_places + first, mask=is_row[:, None] & is_depth[None, :], other=0.0)
        weight = tl.load(matrix + first, mask=is_depth[:, None] & is_column[None, :], other=0.0)
        weight = weight.to(tl.float32).to(tl.bfloat16)
        if IS_BLOCKED:
            scale = tl.load(scales + (columns // BLOCK) * scale_row + first // BLOCK,
                            mask=is_column, other=0.0)
            total += tl.dot(part, weight) * scale[None, :]
        else:
            total = tl.dot(part, weight, total)
    if not IS_BLOCKED:
        total *= tl.load(scales + columns * scale_row, mask=is_column, other=0.0)[None, :]
    place = tl.program_id(1).to(tl.int64) * num_rows * num_columns + (
        rows[:, None] * num_columns + columns[None, :])
    tl.store(parts + place, total, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _few_int4(
    x, packed, scales, zeros, order, parts, num_rows, num_columns, width, part_len, x_row, group,
    HAS_ORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):
    """As `_few_fp8`. A step lies in one group. Nibbles become 128 + q, a bf16 number whose low bits
    are q; what that adds to the product is taken off by the sum of the inputs."""
    half: tl.constexpr = DEPTH // 2
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows, octets = tl.arange(0, ROWS), tl.arange(0, half)
    is_row, is_column = rows < num_rows, columns < num_columns
    # of 32 inputs the first 16 are low halves
    inputs = octets // 16 * 32 + octets % 16
    groups = width // group
    start = tl.program_id(1) * part_len
    stop = tl.minimum(start + part_len, width)
    matrix = packed + columns.to(tl.int64)[None, :] * (width // 2) + octets[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(start, stop, DEPTH):
        low, high = first + inputs, first + inputs + 16
        if HAS_ORDER:
            low, high = tl.load(order + low), tl.load(order + high)
        row_places = x + rows[:, None] * x_row
        few = tl.load(row_places + low[None, :], mask=is_row[:, None], other=0.0)
        more = tl.load(row_places + high[None, :], mask=is_row[:, None], other=0.0)
        pairs = tl.load(matrix + first // 2, mask=is_column[None, :], other=0).to(tl.int16)
        part = tl.dot(few, ((pairs & 15) | 0x4300).to(tl.bfloat16, bitcast=True))
        part = tl.dot(more, ((pairs >> 4) | 0x4300).to(tl.bfloat16, bitcast=True), part)
        sums = tl.sum(few.to(tl.float32), 1) + tl.sum(more.to(tl.float32), 1)
        place = columns * groups + first // group
        scale = tl.load(scales + place, mask=is_column, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, mask=is_column, other=0).to(tl.float32)
        total += (part - sums[:, None] * (128.0 + zero)[None, :]) * scale[None, :]
    place = tl.program_id(1).to(tl.int64) * num_rows * num_columns + (
        rows[:, None] * num_columns + columns[None, :])
    tl.store(parts + place, total, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _add_parts(
    parts, bias, out, count, num_rows, num_columns, HAS_BIAS: tl.constexpr, TILE: tl.constexpr,
):
    """Add up one row's parts, in their order."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < num_columns
    total = tl.zeros([TILE], tl.float32)
    for index in tl.range(0, count):
        place = (index * num_rows + row).to(tl.int64) * num_columns + columns
        total += tl.load(parts + place, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * num_columns + columns, total.to(out.dtype.element_ty),
             mask=mask)
