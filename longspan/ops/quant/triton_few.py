"""Products of a few rows with quantised weights (Triton): decode steps, which read weights once.

Weights come as they are stored and are multiplied in bf16; activations are not rounded. Each
program streams some outputs' weights, over all inputs or a part of them; parts are added up by a
second kernel, in their order. Grids depend on shapes alone: graph capture is safe.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.types import FP8_BLOCK, Fp8Weights, Int4Weights

MAX_ROWS = 16
INT4_ROWS = 64
"""Up to so many rows int4 is read as it is: more rows of fp8 have products of their own."""
DEPTH = 128
"""Inputs of a step, at most."""


class Launch(NamedTuple):
    """How weights are streamed: measured, see `log.md`."""

    columns: int
    """Outputs of a program."""
    programs: int
    """Inputs are parted until there are about so many programs."""
    min_part: int
    """Inputs of a part, at least."""
    stages: int
    warps: int


FP8 = Launch(64, 792, 512, 5, 4)
INT4 = Launch(128, 792, 512, 4, 4)
INT4_MANY = Launch(64, 396, 1_024, 3, 4)
"""With more than `MAX_ROWS` rows."""
SUM_TILE = 1_024
ROW_SCALES, BLOCK_SCALES = 0, 1


def fp8_linear(x: Tensor, weights: Fp8Weights, bias: Tensor | None) -> Tensor:
    """See `eager.fp8_linear`. x: [T, K] bf16, T <= `MAX_ROWS`."""
    num_columns, width = weights.values.shape
    call = _Call(x, num_columns, width, DEPTH, FP8)
    _few_fp8[call.grid](
        x, weights.values, weights.scales, call.parts, x.shape[0], num_columns, width,
        call.part_len, x.stride(0), weights.scales.stride(0), ROWS=MAX_ROWS, COLUMNS=FP8.columns,
        DEPTH=DEPTH, BLOCK=FP8_BLOCK, IS_BLOCKED=weights.is_blocked, num_warps=FP8.warps,
        num_stages=FP8.stages)
    return call.total(bias)


def int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None) -> Tensor:
    """See `eager.int4_linear`. x: [T, K] bf16, T <= `INT4_ROWS`."""
    num_columns, width = weights.shape
    depth = math.gcd(weights.group, DEPTH)
    launch = INT4 if len(x) <= MAX_ROWS else INT4_MANY
    if weights.order is not None:
        x = x.index_select(1, weights.order)
    call = _Call(x, num_columns, width, depth, launch)
    _few_int4[call.grid](
        x, weights.packed, weights.scales, weights.zeros, call.parts, x.shape[0], num_columns,
        width // 2, call.part_len // 2, x.stride(0), weights.group,
        ROWS=max(MAX_ROWS, triton.next_power_of_2(len(x))), COLUMNS=launch.columns, DEPTH=depth,
        IS_COMPILED=_is_compiled(x), num_warps=launch.warps, num_stages=launch.stages)
    return call.total(bias)


@cache
def supports_fp8(device: torch.device) -> bool:
    """Return whether kernels can read e4m3 there: from Ada on."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _is_compiled(x: Tensor) -> bool:
    """Return whether kernels run on a GPU, and so know its instructions."""
    return x.is_cuda


class _Call:
    """Grid, partial sums and their total."""

    def __init__(
        self, x: Tensor, num_columns: int, width: int, depth: int, launch: Launch,
    ) -> None:
        assert x.shape[0] <= INT4_ROWS and x.stride(1) == 1 and x.dtype == torch.bfloat16
        tiles = triton.cdiv(num_columns, launch.columns)
        count = max(1, min(triton.cdiv(launch.programs, tiles), width // launch.min_part))
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


_WIDEN = tl.constexpr("""{
    .reg .b32 first, second, number, one;
    mov.b32 one, 0x3F803F80;
    prmt.b32 first, $4, 0x43434343, 0x4140;
    prmt.b32 second, $4, 0x43434343, 0x4342;
    and.b32 number, first, 0xFF0FFF0F;
    fma.rn.bf16x2 $0, number, one, $5;
    and.b32 number, second, 0xFF0FFF0F;
    fma.rn.bf16x2 $1, number, one, $6;
    shr.u32 first, first, 4;
    lop3.b32 number, first, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $2, number, one, $5;
    shr.u32 second, second, 4;
    lop3.b32 number, second, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $3, number, one, $6;
}""")
"""Four octets, and what is added to their numbers: bytes become the low halves of bf16 numbers from
128 on, whose last four bits of mantissa are the nibble. All of it is exact."""


@triton.jit
def _widened(pairs, zero, IS_COMPILED: tl.constexpr):
    """Return low and high numbers of octets less their zero points, two of [D, N] bf16. pairs:
    [D, N] uint8; zero: [N] uint8."""
    if IS_COMPILED:
        added = (-128.0 - zero.to(tl.float32)).to(tl.bfloat16)
        added = tl.broadcast_to(added[None, :], pairs.shape)
        low, high = tl.inline_asm_elementwise(
            _WIDEN, "=r,=r,=r,=r,r,r,r", [pairs, added], dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=4)
    else:
        less = zero.to(tl.float32)[None, :]
        low = ((pairs & 15).to(tl.float32) - less).to(tl.bfloat16)
        high = ((pairs >> 4).to(tl.float32) - less).to(tl.bfloat16)
    return low, high


@triton.jit
def _few_int4(
    x, packed, scales, zeros, parts, num_rows, num_columns, row_octets, part_octets, x_row, group,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, IS_COMPILED: tl.constexpr,
):
    """As `_few_fp8`. A step lies in one group, whose scales and zeros are loaded a step ahead."""
    half: tl.constexpr = DEPTH // 2
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows, octets = tl.arange(0, ROWS), tl.arange(0, half)
    is_row, is_column = rows < num_rows, columns < num_columns
    # of 32 inputs the first 16 are low halves
    inputs = octets // 16 * 32 + octets % 16
    groups, group_octets = 2 * row_octets // group, group // 2
    # places are counted in octets, so that the compiler sees how they are aligned
    start = tl.program_id(1) * part_octets
    stop = tl.minimum(start + part_octets, row_octets)
    row_places = x + rows[:, None] * x_row + inputs[None, :]
    matrix = packed + columns.to(tl.int64)[None, :] * row_octets + octets[:, None]
    place = columns.to(tl.int64) * groups
    scale = tl.load(scales + place + start // group_octets, mask=is_column, other=0.0)
    zero = tl.load(zeros + place + start // group_octets, mask=is_column, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(start, stop, half):
        pairs = tl.load(matrix + first, mask=is_column[None, :], other=0)
        few = tl.load(row_places + 2 * first, mask=is_row[:, None], other=0.0)
        more = tl.load(row_places + 2 * first + 16, mask=is_row[:, None], other=0.0)
        low, high = _widened(pairs, zero, IS_COMPILED)
        part = tl.dot(few, low)
        part = tl.dot(more, high, part)
        total += part * scale.to(tl.float32)[None, :]
        following = (first + half) // group_octets
        is_there = is_column & (first + half < stop)
        scale = tl.load(scales + place + following, mask=is_there, other=0.0)
        zero = tl.load(zeros + place + following, mask=is_there, other=0)
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
