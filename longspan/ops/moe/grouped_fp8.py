"""Routed experts by PyTorch's grouped fp8 products, one each way, for prefills of many rows.

Tokens are rounded to e4m3 once and gathered so; what the experts make of them is rounded where
SwiGLU makes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.moe.triton import combine
from longspan.ops.moe.triton_routing import group
from longspan.ops.quant import scaled, triton_rows
from longspan.ops.types import Fp8Weights


def supports(x: Tensor, gate_up: Fp8Weights, down: Fp8Weights) -> bool:
    """Return whether this PyTorch and GPU have the products for such operands."""
    return x.dtype == torch.bfloat16 and scaled.supports_grouped(gate_up, down)


def add_routed_mlp(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Fp8Weights,
    down: Fp8Weights,
) -> None:
    """See `reference.add_routed_mlp`. Needs what `supports` says."""
    num_chosen = experts.shape[1]
    order, ends = group(experts, gate_up.values.shape[0])
    tokens, rounded = order // num_chosen, triton_rows.quantize(x, 0)
    # bytes are gathered, for which every PyTorch has a kernel
    values = rounded.values.view(torch.uint8).index_select(0, tokens).view(torch.float8_e4m3fn)
    scales = rounded.scales.flatten().index_select(0, tokens)
    hidden = triton_rows.silu_mul(scaled.grouped(values, scales, gate_up, ends, x.dtype), 0)
    del values
    count = hidden.num_rows
    routed = scaled.grouped(
        hidden.values[:count], hidden.scales.flatten()[:count], down, ends, x.dtype)
    places = torch.empty_like(order)
    places[order.long()] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    combine(sums, routed, weights, places)
