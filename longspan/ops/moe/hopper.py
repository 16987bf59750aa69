"""Routed experts on Hopper, for prefills of many rows: two products and a sum of rows.

The way up gathers its tokens and leaves silu(gate) * up; the way down takes those rows as they lie,
weighs its outputs and puts them to their routes. With e4m3 weights that have a scale for each
output, tokens are rounded once, before they are gathered, and what the experts make of them between
the products: a row's scale is that of its largest number, which no tile of the first product knows.

Shapes: T tokens, E experts, k chosen ones, R = T k routes, M model dim, F width of one expert.
"""

from __future__ import annotations

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
from longspan.ops.types import Fp8Rows, Fp8Weights

ALIGNED_BYTES = 16
LEAST_STEPS = 4
"""Steps of both products: the second consumer begins with the third."""
LISTED_TILES = 64


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
    groups = group(experts, gate_up.shape[0])
    tiles = list_tiles(groups.ends, len(groups.order))
    is_rounded = isinstance(gate_up, Fp8Weights)
    rows = triton_rows.quantize(x, 0) if is_rounded else x
    hidden = expert_up(rows, groups, tiles, gate_up, experts.shape[1])
    down_rows = triton_rows.quantize(hidden, 0) if is_rounded else hidden
    del hidden
    combine(sums, expert_down(down_rows, groups, tiles, weights, down), weights)


def list_tiles(ends: Tensor, num_routes: int) -> Tensor:
    """List tiles of rows: expert, first row, where the expert's rows end. ends: [E] int32. Returns
    [most tiles + 1, 3] int32, the last row beginning with how many there are."""
    num_experts = len(ends)
    most = row_tiles(num_routes, num_experts, TILE_ROWS)
    tiles = torch.empty(most + 1, 3, dtype=torch.int32, device=ends.device)
    _list_tiles[(triton.cdiv(most, LISTED_TILES),)](
        ends, tiles, most, num_experts, EXPERTS=triton.next_power_of_2(num_experts),
        LISTED=LISTED_TILES, ROWS=TILE_ROWS, num_warps=4)
    return tiles


def expert_up(
    x: Tensor | Fp8Rows, groups: Groups, tiles: Tensor, gate_up: Tensor | Fp8Weights,
    num_chosen: int,
) -> Tensor:
    """Compute silu(gate) * up of every route. x: [T, M]; gate_up: [E, 2F, M]. Returns [R, F] in
    the order of the groups; rows of experts that are not here hold anything."""
    values, weights = _values(x), _values(gate_up)
    num_routes, width = len(groups.order), weights.shape[1] // 2
    out = torch.empty(num_routes, width, dtype=torch.bfloat16, device=values.device)
    _launch(values, values, weights, out, groups, tiles, out, _scales(x, out),
            _scales(gate_up, out), width // (TILE_COLUMNS // 2), width, num_chosen, gathered=True)
    return out


def expert_down(
    hidden: Tensor | Fp8Rows, groups: Groups, tiles: Tensor, route_weights: Tensor,
    down: Tensor | Fp8Weights,
) -> Tensor:
    """Compute the weighted output of every route. hidden: [R, F] in the order of the groups;
    route_weights: [T, k] fp32; down: [E, M, F]. Returns [R, M] in the order of the routes; rows of
    experts that are not here hold anything."""
    assert route_weights.is_contiguous()
    values, weights = _values(hidden), _values(down)
    num_routes, dim = len(groups.order), weights.shape[1]
    out = torch.empty(num_routes, dim, dtype=torch.bfloat16, device=values.device)
    _launch(_tiles_of(values, TILE_ROWS), values, weights, out, groups, tiles, route_weights,
            _scales(hidden, out), _scales(down, out), dim // TILE_COLUMNS, TILE_COLUMNS // 2, 1,
            gathered=False)
    return out


def _launch(
    a: Tensor | TensorDescriptor, values: Tensor, weights: Tensor, out: Tensor, groups: Groups,
    tiles: Tensor, route_weights: Tensor, row_scales: Tensor, scales: Tensor, column_tiles: int,
    second: int, num_chosen: int, *, gathered: bool,
) -> None:
    """Launch one product. What is not read is given as something else that is there."""
    depth = STEP_BYTES // weights.element_size()
    product_kernel[(num_sms(out.device),)](
        a, _tiles_of(weights.flatten(0, 1), TILE_COLUMNS // 2), out, tiles, groups.order,
        route_weights, row_scales, scales, len(tiles) - 1, column_tiles,
        weights.shape[2] // depth, weights.shape[1], second, num_chosen,
        values.stride(0), out.stride(0), GATHERED=gathered,
        SCALED=weights.dtype == torch.float8_e4m3fn, num_warps=4)


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
    ends, tiles, most, num_experts, EXPERTS: tl.constexpr, LISTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write LISTED rows of the table; those behind the last tile are left as they are."""
    numbers, is_expert, starts, stops, counts, tile_ends = tiles_of_experts(
        ends, num_experts, EXPERTS, ROWS)
    own = tl.program_id(0) * LISTED + tl.arange(0, LISTED)
    expert = tl.sum(((tile_ends[None, :] <= own[:, None]) & is_expert[None, :]).to(tl.int32), 1)
    is_own = numbers[None, :] == expert[:, None]
    first = tl.sum(tl.where(is_own, (starts - (tile_ends - counts) * ROWS)[None, :], 0), 1)
    stop = tl.sum(tl.where(is_own, stops[None, :], 0), 1)
    is_there = expert < num_experts
    tl.store(tiles + own * 3, expert, mask=is_there)
    tl.store(tiles + own * 3 + 1, first + own * ROWS, mask=is_there)
    tl.store(tiles + own * 3 + 2, stop, mask=is_there)
    if tl.program_id(0) == 0:
        tl.store(tiles + most * 3, tl.sum(counts, 0))
