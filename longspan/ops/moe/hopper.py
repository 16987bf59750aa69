"""Routed experts on Hopper, for prefills of many rows: two products and a sum of rows.

The way up gathers its tokens and leaves silu(gate) * up; the way down takes those rows as they lie.
Each expert's rows fill whole tiles, so that TMA can store them, and the sum finds a route's row in
a table. With e4m3 weights that have a scale for each output, tokens are rounded once, before they
are gathered, and what the experts make of them where it is made, in groups of 128 columns.

Shapes: T tokens, E experts, k chosen ones, R = T k routes, M model dim, F width of one expert,
P rows of all tiles that there can be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longspan.ops.moe.hopper_product import STEP_BYTES, TILE_COLUMNS, TILE_ROWS, product_kernel
from longspan.ops.moe.triton import combine, row_tiles, tiles_of_experts
from longspan.ops.moe.triton_routing import MAX_EXPERTS, Groups, group
from longspan.ops.quant import triton_rows
from longspan.ops.tiles.hopper import is_hopper
from longspan.ops.tiles.splits import num_sms
from longspan.ops.types import FP8_BLOCK, Fp8Rows, Fp8Weights

ALIGNED_BYTES = 16
LEAST_STEPS = 4
"""Steps of both products: the second consumer begins with the third."""


def supports(x: Tensor, gate_up: Tensor | Fp8Weights, down: Tensor | Fp8Weights) -> bool:
    """Return whether the kernels take such rows and experts."""
    if isinstance(gate_up, Fp8Weights) != isinstance(down, Fp8Weights):
        return False
    up_values, down_values = _values(gate_up), _values(down)
    step = STEP_BYTES // up_values.element_size()
    num_experts, twice, dim = up_values.shape
    if isinstance(gate_up, Fp8Weights) and isinstance(down, Fp8Weights):
        is_form = all(not part.is_blocked and part.scales.is_contiguous()
                      for part in (gate_up, down))
    else:
        is_form = up_values.dtype == down_values.dtype == torch.bfloat16
    is_aligned = all(part.data_ptr() % ALIGNED_BYTES == 0 for part in (x, up_values, down_values))
    return (is_hopper(x.device) and is_form and is_aligned and x.dtype == torch.bfloat16
            and x.stride(1) == 1 and x.stride(0) * x.element_size() % ALIGNED_BYTES == 0
            and up_values.is_contiguous() and down_values.is_contiguous()
            and num_experts <= MAX_EXPERTS and twice % TILE_COLUMNS == 0
            and dim % TILE_COLUMNS == 0 and twice // 2 % step == 0
            and min(dim, twice // 2) >= LEAST_STEPS * step)


def add_routed_mlp(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor | Fp8Weights,
    down: Tensor | Fp8Weights,
) -> None:
    """See `reference.add_routed_mlp`. Needs what `supports` says."""
    if not x.shape[0]:
        return
    is_rounded = isinstance(gate_up, Fp8Weights)
    rows = triton_rows.quantize(x, 0) if is_rounded else x
    tiles = list_tiles(group(experts, gate_up.shape[0]), experts.shape[1], rows)
    routed = expert_down(expert_up(rows, tiles, gate_up), tiles, down)
    combine(sums, routed, weights, tiles.places)


class RowTiles(NamedTuple):
    """Each expert's rows in tiles of their own, the last one filled up with any of its tokens."""

    experts: Tensor
    """[P / 128 + 1] int32: the expert of each tile; behind them, how many there are."""
    tokens: Tensor
    """[P] int32: the token of each row."""
    places: Tensor
    """[R] int32: the row of each route; anything where its expert is not here."""
    scales: Tensor | None
    """[P] fp32: scales of rounded tokens."""


def list_tiles(groups: Groups, num_chosen: int, x: Tensor | Fp8Rows) -> RowTiles:
    """Put routes into tiles. x: [T, M], from which scales are taken where it has some."""
    num_routes, num_experts = len(groups.order), len(groups.ends)
    most = row_tiles(num_routes, num_experts, TILE_ROWS)
    experts, tokens, places = (
        torch.empty(count, dtype=torch.int32, device=groups.order.device)
        for count in (most + 1, most * TILE_ROWS, num_routes))
    scales = None if isinstance(x, Tensor) else torch.empty_like(tokens, dtype=torch.float32)
    _list_tiles[(most,)](
        groups.ends, groups.order, _scales(x, tokens), experts, tokens, places,
        tokens if scales is None else scales, most, num_experts, num_chosen,
        EXPERTS=triton.next_power_of_2(num_experts), ROWS=TILE_ROWS, SCALED=scales is not None,
        num_warps=4)
    return RowTiles(experts, tokens, places, scales)


def expert_up(
    x: Tensor | Fp8Rows, tiles: RowTiles, gate_up: Tensor | Fp8Weights,
) -> Tensor | Fp8Rows:
    """Compute silu(gate) * up of every route. x: [T, M]; gate_up: [E, 2F, M]. Returns [P, F];
    rows of tiles that there are not hold anything."""
    values, weights = _values(x), _values(gate_up)
    num_rows, width = len(tiles.tokens), weights.shape[1] // 2
    if isinstance(x, Tensor):
        hidden: Tensor | Fp8Rows = torch.empty(
            num_rows, width, dtype=torch.bfloat16, device=x.device)
    else:
        hidden = triton_rows.allocate(num_rows, width, FP8_BLOCK, values.device)
    out = _values(hidden)
    _launch(values, values, weights, out, tiles, tiles.tokens if tiles.scales is None
            else tiles.scales, _scales(gate_up, out), _scales(hidden, out),
            width // (TILE_COLUMNS // 2), width, gathered=True)
    return hidden


def expert_down(
    hidden: Tensor | Fp8Rows, tiles: RowTiles, down: Tensor | Fp8Weights,
) -> Tensor:
    """Compute the output of every route. hidden: [P, F]; down: [E, M, F]. Returns [P, M]; rows of
    tiles that there are not hold anything."""
    values, weights = _values(hidden), _values(down)
    dim = weights.shape[1]
    out = torch.empty(len(tiles.tokens), dim, dtype=torch.bfloat16, device=values.device)
    _launch(_tiles_of(values, TILE_ROWS), values, weights, out, tiles, _scales(hidden, out),
            _scales(down, out), out, dim // TILE_COLUMNS, TILE_COLUMNS // 2, gathered=False)
    return out


def _launch(
    a: Tensor | TensorDescriptor, values: Tensor, weights: Tensor, out: Tensor, tiles: RowTiles,
    row_scales: Tensor, scales: Tensor, hidden_scales: Tensor, column_tiles: int, second: int,
    *, gathered: bool,
) -> None:
    """Launch one product. What is not read is given as something else that is there."""
    depth = STEP_BYTES // weights.element_size()
    product_kernel[(num_sms(out.device),)](
        a, _tiles_of(weights.flatten(0, 1), TILE_COLUMNS // 2), _tiles_of(out, TILE_ROWS // 2),
        tiles.experts, tiles.tokens, row_scales, scales, hidden_scales, len(tiles.experts) - 1,
        weights.shape[2] // depth, weights.shape[1], second, values.stride(0),
        COLUMN_TILES=column_tiles, GATHERED=gathered, SCALED=weights.dtype == torch.float8_e4m3fn,
        num_warps=4)


def _tiles_of(matrix: Tensor, rows: int) -> TensorDescriptor:
    """Describe tiles of some rows by 128 bytes. matrix: [N, K], contiguous."""
    size = matrix.element_size()
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=STEP_BYTES, element_bitwidth=8 * size, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()),
                            [rows, STEP_BYTES // size], layout)


def _values(matrices: Tensor | Fp8Weights | Fp8Rows) -> Tensor:
    return matrices if isinstance(matrices, Tensor) else matrices.values


def _scales(matrices: Tensor | Fp8Weights | Fp8Rows, spare: Tensor) -> Tensor:
    return spare if isinstance(matrices, Tensor) else matrices.scales


@triton.jit(do_not_specialize=["most"])
def _list_tiles(
    ends, order, row_scales, experts, tokens, places, scales, most, num_experts, num_chosen,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
):
    """Write what the tables have of one tile, if there is such a one, and how many there are."""
    tile = tl.program_id(0)
    numbers, is_expert, starts, stops, counts, tile_ends = tiles_of_experts(
        ends, num_experts, EXPERTS, ROWS)
    if tile == 0:
        tl.store(experts + most, tl.sum(counts, 0))
    expert = tl.sum(((tile_ends <= tile) & is_expert).to(tl.int32), 0)
    if expert < num_experts:
        is_own = numbers == expert
        first = tl.sum(tl.where(is_own, starts + (tile - tile_ends + counts) * ROWS, 0), 0)
        stop = tl.sum(tl.where(is_own, stops, 0), 0)
        rows = tl.arange(0, ROWS)
        routes = tl.load(order + tl.minimum(first + rows, stop - 1))
        tl.store(experts + tile, expert)
        tl.store(tokens + tile * ROWS + rows, routes // num_chosen)
        tl.store(places + routes, tile * ROWS + rows, mask=first + rows < stop)
        if SCALED:
            tl.store(scales + tile * ROWS + rows, tl.load(row_scales + routes // num_chosen))
