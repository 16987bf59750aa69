"""Routed experts (Triton): grouped products that gather their rows and fuse the activation.

Routes lie in the order of their experts (`triton_routing`), each expert's in tiles of its own, and
a program finds its tile from where the experts' routes end: nothing is read on the host, grids
depend on shapes alone, and a step that is recorded as a CUDA graph reads the weights of whatever
experts its tokens take, and no others. The same kernels serve a prefill's thousands of rows and a
decode step's few, with other tiles.

Shapes: T tokens, E experts, k chosen ones, R = T k routes, M model dim, F width of one expert.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.moe.triton_routing import MAX_EXPERTS, Groups, group
from longspan.ops.quant.triton_few import supports_fp8
from longspan.ops.types import Fp8Weights

COMBINE_TILE = 1_024


class Tiles(NamedTuple):
    """Sizes of one product's tiles."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int


FEW = (Tiles(16, 32, 128, 4, 4), Tiles(16, 32, 128, 4, 4))
"""Up and down, where an expert has few routes: the weights' way through is all that counts."""
SOME = (Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4))
MANY = (Tiles(128, 64, 64, 4, 8), Tiles(128, 128, 64, 4, 8))
SUPER = 8
"""Row tiles whose programs come together for each column tile, so that weights stay in the L2."""


def add_routed_mlp(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor | Fp8Weights,
    down: Tensor | Fp8Weights,
) -> None:
    """See `reference.add_routed_mlp`. Needs what `supports` says."""
    assert supports(x, gate_up)
    if not x.shape[0]:
        return
    groups = group(experts, gate_up.shape[0])
    up_tiles, down_tiles = choose_tiles(experts.numel(), gate_up.shape[0])
    hidden = expert_up(x, groups, gate_up, experts.shape[1], up_tiles)
    routed = expert_down(hidden, groups, weights, down, down_tiles)
    combine(sums, routed, weights)


def supports(x: Tensor, gate_up: Tensor | Fp8Weights) -> bool:
    """Return whether the kernels take such rows and experts."""
    if isinstance(gate_up, Fp8Weights):
        values = gate_up.values
        return (values.shape[0] <= MAX_EXPERTS and x.stride(1) == 1 and values.is_contiguous()
                and x.dtype == torch.bfloat16 and supports_fp8(x.device))
    return (gate_up.shape[0] <= MAX_EXPERTS and x.stride(1) == 1 and gate_up.is_contiguous()
            and x.dtype == gate_up.dtype and x.dtype in (torch.float32, torch.bfloat16))


def choose_tiles(num_routes: int, num_experts: int) -> tuple[Tiles, Tiles]:
    """Choose tiles for both products by how many routes an expert has, about."""
    mean = num_routes / num_experts
    return FEW if mean <= 16 else SOME if mean <= 64 else MANY


def expert_up(
    x: Tensor, groups: Groups, gate_up: Tensor | Fp8Weights, num_chosen: int, tiles: Tiles,
) -> Tensor:
    """Compute silu(gate) * up of every route. x: [T, M]; gate_up: [E, 2F, M]. Returns [R, F] in
    the order of the groups."""
    matrices = _Matrices.of(gate_up)
    num_routes, (num_experts, twice, dim) = groups.order.shape[0], gate_up.shape
    out = torch.empty(num_routes, twice // 2, dtype=x.dtype, device=x.device)
    grid = row_tiles(num_routes, num_experts, tiles.rows) * triton.cdiv(twice // 2, tiles.columns)
    _expert_up[(grid,)](
        x, matrices.values, matrices.scales, out, groups.order, groups.ends, num_routes,
        num_experts, dim, twice // 2, num_chosen, x.stride(0),
        row_tiles(num_routes, num_experts, tiles.rows),
        EXPERTS=triton.next_power_of_2(num_experts), ROWS=tiles.rows, COLUMNS=tiles.columns,
        DEPTH=tiles.depth, IS_WHOLE=dim % tiles.depth == 0, SUPER=SUPER,
        SCALES=matrices.kind, PRECISION=_precision(x), STAGES=tiles.stages, num_warps=tiles.warps)
    return out


def expert_down(
    hidden: Tensor, groups: Groups, weights: Tensor, down: Tensor | Fp8Weights, tiles: Tiles,
) -> Tensor:
    """Compute the weighted output of every route. hidden: [R, F] in the order of the groups;
    weights: [T, k] fp32; down: [E, M, F]. Returns [R, M] in the order of the routes."""
    matrices = _Matrices.of(down)
    num_routes, (num_experts, dim, width) = groups.order.shape[0], down.shape
    assert weights.is_contiguous() and matrices.values.is_contiguous()
    out = torch.empty(num_routes, dim, dtype=hidden.dtype, device=hidden.device)
    grid = row_tiles(num_routes, num_experts, tiles.rows) * triton.cdiv(dim, tiles.columns)
    _expert_down[(grid,)](
        hidden, matrices.values, matrices.scales, weights, out, groups.order, groups.ends,
        num_routes, num_experts, dim, width,
        row_tiles(num_routes, num_experts, tiles.rows),
        EXPERTS=triton.next_power_of_2(num_experts), ROWS=tiles.rows, COLUMNS=tiles.columns,
        DEPTH=tiles.depth, IS_WHOLE=width % tiles.depth == 0, SUPER=SUPER,
        SCALES=matrices.kind, PRECISION=_precision(hidden), STAGES=tiles.stages,
        num_warps=tiles.warps)
    return out


def combine(
    sums: Tensor, routed: Tensor, weights: Tensor, places: Tensor | None = None,
) -> None:
    """Add each token's k rows to it, in fp32, in place.

    Args:
        sums: [T, M]
        routed: [R, M]; rows of weight 0 are not read: nobody may have written them.
        weights: [T, k] fp32
        places: [R] int32, the row of each route, to be multiplied by its weight; None: they lie
            in the order of the routes, and are.
    """
    num_tokens, dim = sums.shape
    assert sums.stride(1) == 1 and routed.is_contiguous() and weights.is_contiguous()
    tile = min(COMBINE_TILE, triton.next_power_of_2(dim))
    _combine[(num_tokens, triton.cdiv(dim, tile))](
        sums, routed, weights, sums if places is None else places, dim, sums.stride(0),
        CHOSEN=weights.shape[1], HAS_PLACES=places is not None, TILE=tile, num_warps=4)


class _Matrices(NamedTuple):
    """Experts as kernels take them."""

    values: Tensor
    scales: Tensor
    kind: int
    """0: no scales; 1: one for each output; 2: for each block of 128 x 128."""

    @classmethod
    def of(cls, matrices: Tensor | Fp8Weights) -> Self:
        """Take them apart."""
        if isinstance(matrices, Tensor):
            return cls(matrices, matrices, 0)
        assert matrices.scales.is_contiguous()
        return cls(*matrices, 2 if matrices.is_blocked else 1)


def row_tiles(num_routes: int, num_experts: int, rows: int) -> int:
    """Return the most tiles that experts' routes can take: each may end in a part of one."""
    return min(num_routes, triton.cdiv(num_routes, rows) + num_experts - 1)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def tiles_of_experts(ends, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Count each expert's tiles of rows: numbers, which of them are experts, where their rows start
    and stop, how many tiles they have, and where those end: six of [EXPERTS]."""
    numbers = tl.arange(0, EXPERTS)
    is_expert = numbers < num_experts
    stops = tl.load(ends + numbers, mask=is_expert, other=0)
    starts = tl.load(ends + numbers - 1, mask=is_expert & (numbers > 0), other=0)
    tiles = tl.where(is_expert, (stops - starts + ROWS - 1) // ROWS, 0)
    return numbers, is_expert, starts, stops, tiles, tl.cumsum(tiles, 0)


@triton.jit
def _place(
    ends, num_experts, num_row_tiles, num_column_tiles,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, SUPER: tl.constexpr,
):
    """Find a program's expert, the rows [ROWS] of its tile in the groups' order, where the expert's
    rows end, and its column tile. An expert of ``num_experts`` or more: there is nothing to do."""
    program = tl.program_id(0)
    width = SUPER * num_column_tiles
    first = program // width * SUPER
    height = tl.minimum(num_row_tiles - first, SUPER)
    tile = first + program % width % height
    column_tile = program % width // height
    numbers, is_expert, starts, stops, tiles, tile_ends = tiles_of_experts(
        ends, num_experts, EXPERTS, ROWS)
    expert = tl.sum(((tile_ends <= tile) & is_expert).to(tl.int32), 0)
    is_own = numbers == expert
    within = tile - tl.sum(tl.where(is_own, tile_ends - tiles, 0), 0)
    start = tl.sum(tl.where(is_own, starts, 0), 0) + within * ROWS
    stop = tl.sum(tl.where(is_own, stops, 0), 0)
    return expert, start + tl.arange(0, ROWS), stop, column_tile


@triton.jit
def _multiply(
    part, weights, total, scales, outputs, width, first, is_column,
    SCALES: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add a step's product. ``outputs``: rows of all matrices, one under the other, that the
    columns are; with block scales the step lies in one block of inputs."""
    if SCALES == 0:
        total = tl.dot(part, weights, total, input_precision=PRECISION)
    else:
        wide = weights.to(tl.float32).to(part.dtype)
        if SCALES == 2:
            place = (outputs // 128) * ((width + 127) // 128) + first // 128
            scale = tl.load(scales + place, mask=is_column, other=0.0)
            total += tl.dot(part, wide) * scale[None, :]
        else:
            total = tl.dot(part, wide, total)
    return total


@triton.jit
def _scaled(total, scales, outputs, is_column, SCALES: tl.constexpr):
    """Multiply by the outputs' scales, where they have some of their own."""
    if SCALES == 1:
        total *= tl.load(scales + outputs, mask=is_column, other=0.0)[None, :]
    return total


@triton.jit(do_not_specialize=["num_routes", "num_row_tiles"])
def _expert_up(
    x, gate_up, scales, out, order, ends, num_routes, num_experts, dim, width, num_chosen, x_row,
    num_row_tiles,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    IS_WHOLE: tl.constexpr, SUPER: tl.constexpr, SCALES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """Compute one tile of silu(gate) * up for rows of one expert, gathered from the tokens."""
    expert, rows, stop, column_tile = _place(
        ends, num_experts, num_row_tiles, (width + COLUMNS - 1) // COLUMNS, EXPERTS, ROWS, SUPER)
    if expert >= num_experts:
        return
    is_row = rows < stop
    tokens = tl.load(order + rows, mask=is_row, other=0) // num_chosen
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    depths = tl.arange(0, DEPTH)
    row_places = x + tokens.to(tl.int64)[:, None] * x_row + depths[None, :]
    matrix = gate_up + expert.to(tl.int64) * 2 * width * dim
    gate_places = matrix + columns[None, :] * dim + depths[:, None]
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, dim, DEPTH, num_stages=STAGES):
        row_mask, column_mask = is_row[:, None], is_column[None, :]
        if not IS_WHOLE:
            row_mask = row_mask & (first + depths < dim)[None, :]
            column_mask = column_mask & (first + depths < dim)[:, None]
        part = tl.load(row_places + first, mask=row_mask, other=0.0)
        gates = tl.load(gate_places + first, mask=column_mask, other=0.0)
        ups = tl.load(gate_places + width * dim + first, mask=column_mask, other=0.0)
        gate = _multiply(part, gates, gate, scales, (expert * 2 * width + columns), dim, first,
                         is_column, SCALES, PRECISION)
        up = _multiply(part, ups, up, scales, (expert * 2 * width + width + columns), dim, first,
                       is_column, SCALES, PRECISION)
    gate = _scaled(gate, scales, expert * 2 * width + columns, is_column, SCALES)
    up = _scaled(up, scales, expert * 2 * width + width + columns, is_column, SCALES)
    # of large negative gates the power is inf, and the quotient 0, as it should be
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + rows.to(tl.int64)[:, None] * width + columns[None, :],
             hidden.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_routes", "num_row_tiles"])
def _expert_down(
    hidden, down, scales, weights, out, order, ends, num_routes, num_experts, dim, width,
    num_row_tiles,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    IS_WHOLE: tl.constexpr, SUPER: tl.constexpr, SCALES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """Compute one tile of an expert's output, weighted, and put its rows to their routes."""
    expert, rows, stop, column_tile = _place(
        ends, num_experts, num_row_tiles, (dim + COLUMNS - 1) // COLUMNS, EXPERTS, ROWS, SUPER)
    if expert >= num_experts:
        return
    is_row = rows < stop
    routes = tl.load(order + rows, mask=is_row, other=0)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < dim
    depths = tl.arange(0, DEPTH)
    row_places = hidden + rows.to(tl.int64)[:, None] * width + depths[None, :]
    matrix = down + expert.to(tl.int64) * dim * width
    column_places = matrix + columns[None, :] * width + depths[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, width, DEPTH, num_stages=STAGES):
        row_mask, column_mask = is_row[:, None], is_column[None, :]
        if not IS_WHOLE:
            row_mask = row_mask & (first + depths < width)[None, :]
            column_mask = column_mask & (first + depths < width)[:, None]
        part = tl.load(row_places + first, mask=row_mask, other=0.0)
        matrix_part = tl.load(column_places + first, mask=column_mask, other=0.0)
        total = _multiply(part, matrix_part, total, scales, expert * dim + columns, width, first,
                          is_column, SCALES, PRECISION)
    total = _scaled(total, scales, expert * dim + columns, is_column, SCALES)
    total *= tl.load(weights + routes, mask=is_row, other=0.0)[:, None]
    tl.store(out + routes.to(tl.int64)[:, None] * dim + columns[None, :],
             total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _combine(
    sums, routed, weights, places, dim, sums_row, CHOSEN: tl.constexpr, HAS_PLACES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add up one token's routes, in the order of its choice."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column = columns < dim
    total = tl.zeros([TILE], tl.float32)
    for choice in tl.static_range(CHOSEN):
        route = token * CHOSEN + choice
        weight = tl.load(weights + route)
        row = tl.load(places + route).to(tl.int64) if HAS_PLACES else route
        # of weight 0: no row
        count = tl.where(weight == 0.0, 0, dim)
        part = tl.load(routed + row * dim + columns, mask=columns < count, other=0.0).to(
            tl.float32)
        total += part * weight if HAS_PLACES else part
    place = sums + token * sums_row + columns
    total += tl.load(place, mask=is_column, other=0.0).to(tl.float32)
    tl.store(place, total.to(sums.dtype.element_ty), mask=is_column)
