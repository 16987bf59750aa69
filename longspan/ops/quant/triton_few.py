"""Products of a few rows with quantised weights (Triton): decode steps, which read weights once.

Weights come as they are stored and are multiplied in bf16; activations are not rounded. Each
program streams some outputs' weights, over all inputs or a part of them; the last one of an output
tile that ends adds up the parts, in their order. Grids depend on shapes alone: graph capture is
safe, of one stream at a time.
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


FP8 = Launch(64, 1_584, 512, 4, 4)
INT4 = Launch(128, 396, 512, 4, 4)
INT4_MANY = Launch(64, 396, 1_024, 3, 4)
"""With more than `MAX_ROWS` rows."""
UNROLLED = tl.constexpr(8)
"""Parts that are on their way together when they are added up."""
MAX_TILES = 65_536
"""Output tiles that can be counted."""
ROW_SCALES, BLOCK_SCALES = 0, 1


def fp8_linear(x: Tensor, weights: Fp8Weights, bias: Tensor | None) -> Tensor:
    """See `eager.fp8_linear`. x: [T, K] bf16, T <= `MAX_ROWS`."""
    num_columns, width = weights.values.shape
    call = _Call(x, num_columns, width, DEPTH, FP8)
    _few_fp8[call.grid](
        x, weights.values, weights.scales, *call.outputs(bias), x.shape[0], num_columns, width,
        call.part_len, x.stride(0), weights.scales.stride(0), ROWS=MAX_ROWS, COLUMNS=FP8.columns,
        DEPTH=DEPTH, BLOCK=FP8_BLOCK, IS_BLOCKED=weights.is_blocked, HAS_BIAS=bias is not None,
        IS_WHOLE=call.is_whole, num_warps=FP8.warps, num_stages=FP8.stages)
    return call.out


def int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None) -> Tensor:
    """See `eager.int4_linear`. x: [T, K] bf16, T <= `INT4_ROWS`."""
    num_columns, width = weights.shape
    depth = math.gcd(weights.group, DEPTH)
    launch = INT4 if len(x) <= MAX_ROWS else INT4_MANY
    if weights.order is not None:
        x = x.index_select(1, weights.order)
    call = _Call(x, num_columns, width, depth, launch)
    _few_int4[call.grid](
        x, weights.packed, weights.scales, weights.zeros, *call.outputs(bias), x.shape[0],
        num_columns, width // 2, call.part_len // 2, x.stride(0), weights.group,
        ROWS=max(MAX_ROWS, triton.next_power_of_2(len(x))), COLUMNS=launch.columns, DEPTH=depth,
        HAS_BIAS=bias is not None, IS_WHOLE=call.is_whole, IS_COMPILED=_is_compiled(x),
        num_warps=launch.warps, num_stages=launch.stages)
    return call.out


@cache
def supports_fp8(device: torch.device) -> bool:
    """Return whether kernels can read e4m3 there: from Ada on."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _is_compiled(x: Tensor) -> bool:
    """Return whether kernels run on a GPU, and so know its instructions."""
    return x.is_cuda


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Return how many programs of each output tile have ended: zeros between launches."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


class _Call:
    """Grid, result and partial sums."""

    def __init__(
        self, x: Tensor, num_columns: int, width: int, depth: int, launch: Launch,
    ) -> None:
        assert x.shape[0] <= INT4_ROWS and x.stride(1) == 1 and x.dtype == torch.bfloat16
        tiles = triton.cdiv(num_columns, launch.columns)
        assert tiles <= MAX_TILES
        count = max(1, min(triton.cdiv(launch.programs, tiles), width // launch.min_part))
        self.part_len = triton.cdiv(triton.cdiv(width, count), depth) * depth
        count = triton.cdiv(width, self.part_len)
        self.grid, self.is_whole = (tiles, count), count == 1
        self.out = torch.empty(x.shape[0], num_columns, dtype=x.dtype, device=x.device)

    def outputs(self, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `_finish` takes: bias, parts, arrivals, out."""
        out = self.out
        parts = out if self.is_whole else torch.empty(
            self.grid[1], *out.shape, dtype=torch.float32, device=out.device)
        return out if bias is None else bias, parts, _arrivals(out.device), out


@triton.jit
def _finish(
    total, rows, columns, bias, parts, arrivals, out, num_rows, num_columns,
    HAS_BIAS: tl.constexpr, IS_WHOLE: tl.constexpr,
):
    """Write a tile, [ROWS, COLUMNS], of the result; where it is a part of the sum, the last program
    that ends adds up all of them, in their order."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    place = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    if IS_WHOLE:
        _store_sum(total, columns, place, mask, bias, out, num_columns, HAS_BIAS)
    else:
        count = tl.num_programs(1)
        own = tl.program_id(1).to(tl.int64) * num_rows * num_columns
        tl.store(parts + own + place, total, mask=mask)
        tl.debug_barrier()  # all threads have stored before one says so
        before = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel")
        if before == count - 1:
            total = tl.zeros_like(total)
            for first in range(0, count, UNROLLED):
                for index in tl.static_range(UNROLLED):
                    part = tl.cast(first + index, tl.int64) * num_rows * num_columns
                    total += tl.load(parts + part + place, mask=mask & (first + index < count),
                                     other=0.0, cache_modifier=".cg")
            tl.store(arrivals + tl.program_id(0), 0)
            _store_sum(total, columns, place, mask, bias, out, num_columns, HAS_BIAS)


@triton.jit
def _store_sum(total, columns, place, mask, bias, out, num_columns, HAS_BIAS: tl.constexpr):
    """Add the bias, and write the result."""
    if HAS_BIAS:
        added = tl.load(bias + columns, mask=columns < num_columns, other=0.0)
        total += added.to(tl.float32)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _few_fp8(
    x, values, scales, bias, parts, arrivals, out, num_rows, num_columns, width, part_len, x_row,
    scale_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    IS_BLOCKED: tl.constexpr, HAS_BIAS: tl.constexpr, IS_WHOLE: tl.constexpr,
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
    _finish(total, rows, columns, bias, parts, arrivals, out, num_rows, num_columns, HAS_BIAS,
            IS_WHOLE)


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
    x, packed, scales, zeros, bias, parts, arrivals, out, num_rows, num_columns, row_octets,
    part_octets, x_row, group,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_WHOLE: tl.constexpr, IS_COMPILED: tl.constexpr,
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
    _finish(total, rows, columns, bias, parts, arrivals, out, num_rows, num_columns, HAS_BIAS,
            IS_WHOLE)
