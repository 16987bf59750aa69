"""Routed experts on a GPU: which kernels choose experts and multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import reference
from longspan.ops.moe import (
    eager,
    grouped,
    grouped_fp8,
    hopper,
    triton_few,
    triton_router,
    triton_routing,
)
from longspan.ops.moe import triton as kernels
from longspan.ops.quant import triton_dense
from longspan.ops.types import Fp8Weights, Matrices

GROUPED_ROUTES = 16_384
"""From so many rows of experts on grouped products are taken: Hopper's, or else PyTorch's."""


def route(logits: Tensor, num_chosen: int, is_normed: bool) -> tuple[Tensor, Tensor]:
    """See `reference.route`."""
    if logits.shape[1] <= triton_routing.MAX_EXPERTS:
        return triton_routing.route(logits, num_chosen, is_normed)
    return reference.route(logits, num_chosen, is_normed)


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """Multiply by the router in fp32, so that which experts a token takes is no matter of rounding.
    x: [T, M]; router: [E, M]; returns [T, E] fp32."""
    if x.dtype != torch.float32:
        return torch.mm(x, router.t(), out_dtype=torch.float32)
    return F.linear(x, router.float())


def route_rows(
    x: Tensor, router: Tensor, num_chosen: int, is_normed: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.route_rows`."""
    if triton_router.supports(x, router):
        return triton_router.route_rows(x, router, num_chosen, is_normed)
    return route(router_logits(x, router), num_chosen, is_normed)


def add_routed_mlp(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Matrices, down: Matrices,
) -> None:
    """See `reference.add_routed_mlp`."""
    args = (sums, x, weights, experts)
    is_many = experts.numel() >= GROUPED_ROUTES
    if isinstance(gate_up, Fp8Weights) and isinstance(down, Fp8Weights):
        if is_many and hopper.supports(x, gate_up, down):
            return hopper.add_routed_mlp(*args, gate_up, down)
        if is_many and grouped_fp8.supports(x, gate_up, down):
            return grouped_fp8.add_routed_mlp(*args, gate_up, down)
        if triton_few.supports(x, gate_up):
            return triton_few.add_routed_mlp(*args, gate_up, down)
        if not is_many and kernels.supports(x, gate_up):
            return kernels.add_routed_mlp(*args, gate_up, down)
    plain = [part if isinstance(part, Tensor) else triton_dense.dequantize(part, x.dtype)
             for part in (gate_up, down)]
    if is_many and hopper.supports(x, *plain):
        return hopper.add_routed_mlp(*args, *plain)
    if is_many and grouped.supports(x, *plain):
        return grouped.add_routed_mlp(*args, *plain)
    if triton_few.supports(x, plain[0]):
        return triton_few.add_routed_mlp(*args, *plain)
    if kernels.supports(x, plain[0]):
        return kernels.add_routed_mlp(*args, *plain)
    return eager.add_routed_mlp(*args, *plain)
