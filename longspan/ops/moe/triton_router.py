"""The router of a few tokens and their choice of experts, in one launch (Triton).

Each program multiplies a token with one of the router's rows; the last one of a token that ends
chooses. A program is one warp, so that nothing waits for other warps, and logits are compared as
integers, which a warp has an instruction for. A token's result is the same whatever else is in the
step.

Shapes: T tokens, M model dim, E experts, k chosen ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.quant.triton_few import arrivals
from longspan.ops.tiles.dependent_launch import early_launch, let_next_begin, wait_for_before

MAX_TOKENS, MAX_EXPERTS = 16, 512
DEPTH = 2_048
"""Inputs of a step."""


def supports(x: Tensor, router: Tensor) -> bool:
    """Return whether the kernel takes such rows and such a router."""
    return (len(x) <= MAX_TOKENS and len(router) <= MAX_EXPERTS and router.is_contiguous()
            and x.dtype == router.dtype == torch.bfloat16 and x.stride(1) == 1)


def route_rows(
    x: Tensor, router: Tensor, num_chosen: int, is_normed: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.route_rows`; experts are int32. Of equal ones the first is chosen. Needs what
    `supports` says."""
    assert supports(x, router)
    (num_tokens, dim), num_experts = x.shape, len(router)
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=x.device)
    experts = torch.empty(num_tokens, num_chosen, dtype=torch.int32, device=x.device)
    if num_tokens:
        _route_rows[(num_experts, num_tokens)](
            x, router, logits, weights, experts, arrivals(x.device), num_experts, dim, x.stride(0),
            CHOSEN=num_chosen, IS_NORMED=is_normed, DEPTH=min(DEPTH, triton.next_power_of_2(dim)),
            WIDTH=triton.next_power_of_2(num_experts), num_warps=1, **early_launch(x.device))
    return weights, experts


@triton.jit
def _route_rows(
    x, router, logits, weights, experts, arrivals, num_experts, dim, x_row,
    CHOSEN: tl.constexpr, IS_NORMED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Compute a token's logit of an expert; if it has all of them now, choose."""
    let_next_begin(EARLY)
    expert, token = tl.program_id(0), tl.program_id(1)
    depths = tl.arange(0, DEPTH)
    column = router + expert * dim + depths
    part = tl.load(column, mask=depths < dim, other=0.0)
    wait_for_before(EARLY)  # the router is there before the token is
    row = x + token.to(tl.int64) * x_row + depths
    inputs = tl.load(row, mask=depths < dim, other=0.0)
    total = part.to(tl.float32) * inputs.to(tl.float32)
    for first in range(DEPTH, dim, DEPTH):
        mask = first + depths < dim
        part = tl.load(column + first, mask=mask, other=0.0)
        inputs = tl.load(row + first, mask=mask, other=0.0)
        total += part.to(tl.float32) * inputs.to(tl.float32)
    own = logits + token * num_experts
    tl.store(own + expert, tl.sum(total, 0))
    tl.debug_barrier()  # all threads have stored before one says so
    before = tl.atomic_add(arrivals + token, 1, sem="acq_rel")
    if before == num_experts - 1:
        tl.store(arrivals + token, 0)
        _choose(own, weights + token * CHOSEN, experts + token * CHOSEN, num_experts, CHOSEN,
                IS_NORMED, WIDTH)


@triton.jit
def _choose(
    logits, weights, experts, num_experts,
    CHOSEN: tl.constexpr, IS_NORMED: tl.constexpr, WIDTH: tl.constexpr,
):
    """Choose a token's experts, and write them in the order of their logits."""
    numbers = tl.arange(0, WIDTH)
    mask = numbers < num_experts
    # past the first-level cache, which knows nothing of other programs' stores
    logit = tl.load(logits + numbers, mask=mask, other=float("-inf"), cache_modifier=".cg")
    left = tl.where(mask, _key(logit), -2147483648)
    place = tl.full([WIDTH], CHOSEN, tl.int32)
    for choice in tl.static_range(CHOSEN):
        is_best = (left == tl.max(left, 0)) & (place == CHOSEN) & mask
        is_best = numbers == tl.min(tl.where(is_best, numbers, WIDTH), 0)
        place = tl.where(is_best, choice, place)
        left = tl.where(is_best, -2147483648, left)
    is_chosen = place < CHOSEN
    power = tl.exp(logit - tl.max(logit, 0))
    total = tl.sum(tl.where(is_chosen, power, 0.0), 0) if IS_NORMED else tl.sum(power, 0)
    tl.store(weights + place, power / total, mask=is_chosen)
    tl.store(experts + place, numbers, mask=is_chosen)


@triton.jit
def _key(logit):
    """Return int32 in the logits' order, NaN at its ends, so that one is the greatest."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)  # 0 where it is -0
    return tl.maximum(tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -2147483647)
