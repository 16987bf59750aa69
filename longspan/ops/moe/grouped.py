"""Routed experts by PyTorch's grouped products, one each way, for prefills of many rows."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.moe.triton import combine
from longspan.ops.moe.triton_routing import group
from longspan.ops.pointwise import silu_mul

ALIGNED_BYTES = 16
"""Rows of all operands begin at multiples of this."""
_grouped_mm = getattr(torch, "_grouped_mm", None)


def supports(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Return whether this PyTorch has the product for such operands."""
    rows = (x.shape[1], down.shape[2])
    return (_grouped_mm is not None and x.dtype == gate_up.dtype == torch.bfloat16
            and all(size * x.element_size() % ALIGNED_BYTES == 0 for size in rows))


def add_routed_mlp(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor,
) -> None:
    """See `reference.add_routed_mlp`. Needs what `supports` says."""
    assert supports(x, gate_up, down) and _grouped_mm is not None
    num_chosen = experts.shape[1]
    order, ends = group(experts, gate_up.shape[0])
    rows = x.index_select(0, order // num_chosen)
    hidden = silu_mul(_grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    del rows
    routed = _grouped_mm(hidden, down.transpose(1, 2), offs=ends)
    places = torch.empty_like(order)
    places[order.long()] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    combine(sums, routed, weights, places)
