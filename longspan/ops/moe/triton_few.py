"""Routed experts of a decode step's few tokens (Triton): two launches, and no order of routes.

A program has one route's expert, and all rows of it: the expert's first route of the step does the
work for the others, whose programs end at once. Rows of a tile are tokens, since a token takes an
expert once, so that nothing has to be sorted or counted before. The way down adds up too: of the
programs of some columns the last one that ends adds all routes to their tokens, each token's in the
order of its choice, so that results are equal from run to run and in any company.

A step of one token is short: what its kernels wait for at their beginnings and ends counts as much
as bytes. So where the GPU can, each kernel begins while the one before ends. Bringing the way
down's weights into the L2 cache meanwhile does not pay: measured, see `log.md`.

Shapes: T tokens, E experts, k chosen ones, R = T k routes, M model dim, F width of one expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.moe import triton as kernels
from longspan.ops.moe.triton import Matrices, Tiles, hidden_tile, output_tile, precision_of
from longspan.ops.quant.triton_few import MAX_TILES, arrivals
from longspan.ops.tiles.dependent_launch import (
    ROUTER_EARLY,
    early_launch,
    let_next_begin,
    wait_for_before,
)
from longspan.ops.types import Fp8Weights

MAX_TOKENS = 8
"""With more tokens, experts have several routes each, and the kernels of before are faster."""
ROWS = 16
"""Rows of a tile: the fewest that a product takes."""
TILES = (Tiles(ROWS, 16, 128, 6, 2), Tiles(ROWS, 32, 256, 3, 4))
"""Up and down; measured, as the others."""
FP8_TILES = (Tiles(ROWS, 32, 256, 4, 4), Tiles(ROWS, 32, 256, 3, 4))
"""The same for e4m3 weights with a scale for each output."""
FP8_TILES_OF_ONE = (Tiles(ROWS, 32, 512, 3, 4), Tiles(ROWS, 32, 128, 6, 4))
"""Theirs for one token, whose programs are few, so that each needs more bytes on their way."""

ALONE = True
"""Whether the programs of a single token are compiled for themselves: nobody else takes their
experts, so the first weights are asked for without having looked."""


def supports(x: Tensor, gate_up: Tensor | Fp8Weights) -> bool:
    """Return whether the kernels take such rows and experts."""
    return len(x) <= MAX_TOKENS and kernels.supports(x, gate_up)


def add_routed_mlp(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor | Fp8Weights,
    down: Tensor | Fp8Weights,
) -> None:
    """See `reference.add_routed_mlp`. Needs what `supports` says, and that no token takes an expert
    twice that is here."""
    assert supports(x, gate_up)
    if not x.shape[0]:
        return
    experts = experts.to(torch.int32).contiguous()
    up_tiles, down_tiles = choose_tiles(gate_up, len(x))
    hidden = expert_up(x, experts, gate_up, up_tiles)
    expert_down(sums, hidden, weights, experts, down, down_tiles)


def choose_tiles(gate_up: Tensor | Fp8Weights, num_tokens: int) -> tuple[Tiles, Tiles]:
    """Choose tiles for both products."""
    if not isinstance(gate_up, Fp8Weights):
        return TILES
    if gate_up.is_blocked:
        return kernels.FEW  # a step has to lie in one block
    return FP8_TILES_OF_ONE if num_tokens == 1 else FP8_TILES


def expert_up(
    x: Tensor, experts: Tensor, gate_up: Tensor | Fp8Weights, tiles: Tiles,
) -> Tensor:
    """Compute silu(gate) * up of every route. x: [T, M]; experts: [T, k] int32; gate_up:
    [E, 2F, M]. Returns [R, F]; rows of routes whose expert is not here hold anything."""
    matrices, (num_experts, twice, dim) = Matrices.of(gate_up), gate_up.shape
    out = torch.empty(experts.numel(), twice // 2, dtype=x.dtype, device=x.device)
    _few_up[(triton.cdiv(twice // 2, tiles.columns), experts.numel())](
        x, matrices.values, matrices.scales, experts, out, len(x), num_experts, dim, twice // 2,
        x.stride(0), **_constants(experts, tiles), IS_WHOLE=dim % tiles.depth == 0,
        SCALES=matrices.kind, PRECISION=precision_of(x), num_warps=tiles.warps,
        **early_launch(x.device))
    return out


def expert_down(
    sums: Tensor, hidden: Tensor, weights: Tensor, experts: Tensor, down: Tensor | Fp8Weights,
    tiles: Tiles,
) -> None:
    """Add every token's weighted outputs to ``sums`` [T, M], in place. hidden: [R, F], as
    `expert_up` returns it; weights: [T, k] fp32; experts: [T, k] int32; down: [E, M, F]."""
    matrices, (num_experts, dim, width) = Matrices.of(down), down.shape
    assert weights.is_contiguous() and matrices.values.is_contiguous() and sums.stride(1) == 1
    column_tiles, early = triton.cdiv(dim, tiles.columns), early_launch(sums.device)
    assert column_tiles <= MAX_TILES
    parts = torch.empty(experts.numel(), dim, dtype=torch.float32, device=sums.device)
    _few_down[(column_tiles, experts.numel())](
        hidden, matrices.values, matrices.scales, weights, experts, parts, sums,
        arrivals(sums.device), len(sums), num_experts, dim, width, sums.stride(0),
        **_constants(experts, tiles), IS_WHOLE=width % tiles.depth == 0, SCALES=matrices.kind,
        PRECISION=precision_of(hidden), NEXT_EARLY=ROUTER_EARLY and early["EARLY"],
        num_warps=tiles.warps, **early)


def _constants(experts: Tensor, tiles: Tiles) -> dict[str, int]:
    """Return what both kernels are compiled for."""
    num_tokens, num_chosen = experts.shape
    return {"IS_ALONE": ALONE and num_tokens == 1, "CHOSEN": num_chosen,
            "CHOICES": triton.next_power_of_2(num_chosen), "ROWS": tiles.rows,
            "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "STAGES": tiles.stages}


@triton.jit
def _routes_of(
    experts, num_tokens, num_experts,
    IS_ALONE: tl.constexpr, CHOSEN: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr,
):
    """Find a program's expert, whether there is something to do, which tokens take the expert, and
    by which routes, two of [ROWS]."""
    route = tl.program_id(1)
    # past the first-level cache: the way down reads before it waits
    expert = tl.load(experts + route, cache_modifier=".cg")
    is_live = expert < num_experts
    tokens, choices = tl.arange(0, ROWS), tl.arange(0, CHOICES)
    if IS_ALONE:
        is_row, own = tokens == 0, tl.where(tokens == 0, route, 0)
    else:
        routes = tokens[:, None] * CHOSEN + choices[None, :]
        is_there = (tokens < num_tokens)[:, None] & (choices < CHOSEN)[None, :]
        others = tl.load(experts + routes, mask=is_there, other=-1, cache_modifier=".cg")
        is_own = is_there & (others == expert)
        is_live &= tl.min(tl.min(tl.where(is_own, routes, ROWS * CHOICES), 1), 0) == route
        is_row = tl.max(is_own.to(tl.int32), 1) > 0
        own = tl.max(tl.where(is_own, routes, 0), 1)
    return tl.where(is_live, expert, 0), is_live, is_row, own


@triton.jit(do_not_specialize=["num_tokens"])
def _few_up(
    x, gate_up, scales, experts, out, num_tokens, num_experts, dim, width, x_row,
    IS_ALONE: tl.constexpr, CHOSEN: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, IS_WHOLE: tl.constexpr,
    SCALES: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):
    """Compute some columns of silu(gate) * up for all tokens of one expert."""
    wait_for_before(EARLY)
    let_next_begin(EARLY)  # not earlier: the next reads the choice, which is complete now
    expert, is_live, is_row, routes = _routes_of(
        experts, num_tokens, num_experts, IS_ALONE, CHOSEN, CHOICES, ROWS)
    if is_live:
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        hidden = hidden_tile(x, gate_up, scales, expert, tl.arange(0, ROWS), is_row, columns, dim,
                             width, x_row, DEPTH, IS_WHOLE, SCALES, PRECISION, STAGES)
        tl.store(out + routes[:, None] * width + columns[None, :],
                 hidden.to(out.dtype.element_ty), mask=is_row[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _few_down(
    hidden, down, scales, weights, experts, parts, sums, arrivals, num_tokens, num_experts, dim,
    width, sums_row,
    IS_ALONE: tl.constexpr, CHOSEN: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, IS_WHOLE: tl.constexpr,
    SCALES: tl.constexpr, PRECISION: tl.constexpr, NEXT_EARLY: tl.constexpr, EARLY: tl.constexpr,
):
    """Compute some columns of an expert's outputs for all its tokens; of the programs of these
    columns the last one adds everything up."""
    let_next_begin(NEXT_EARLY)
    expert, is_live, is_row, routes = _routes_of(
        experts, num_tokens, num_experts, IS_ALONE, CHOSEN, CHOICES, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < dim
    if is_live:
        total = output_tile(hidden, down, scales, weights, expert, routes, routes, is_row, columns,
                            dim, width, DEPTH, IS_WHOLE, SCALES, PRECISION, STAGES, EARLY)
        tl.store(parts + routes[:, None] * dim + columns[None, :], total,
                 mask=is_row[:, None] & is_column[None, :])
    else:
        wait_for_before(EARLY)
    tl.debug_barrier()  # all threads have stored before one says so
    before = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel")
    if before == tl.num_programs(1) - 1:
        tl.store(arrivals + tl.program_id(0), 0)
        _add_up(parts, weights, sums, num_tokens, columns, is_column, dim, sums_row, CHOSEN, ROWS)


@triton.jit
def _add_up(
    parts, weights, sums, num_tokens, columns, is_column, dim, sums_row,
    CHOSEN: tl.constexpr, ROWS: tl.constexpr,
):
    """Add some columns of all routes to their tokens."""
    tokens = tl.arange(0, ROWS)
    is_token = tokens < num_tokens
    mask = is_token[:, None] & is_column[None, :]
    places = sums + tokens.to(tl.int64)[:, None] * sums_row + columns[None, :]
    before = tl.load(places, mask=mask, other=0.0)
    total = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    for choice in tl.static_range(CHOSEN):
        routes = tokens * CHOSEN + choice
        weight = tl.load(weights + routes, mask=is_token, other=0.0)
        part = tl.load(parts + routes[:, None] * dim + columns[None, :], mask=mask, other=0.0,
                       cache_modifier=".cg")
        # of weight 0: nobody may have written the row, but its load need not wait for the weight
        total += tl.where((weight != 0.0)[:, None], part, 0.0)
    tl.store(places, (total + before.to(tl.float32)).to(sums.dtype.element_ty), mask=mask)
