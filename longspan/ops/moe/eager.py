"""Routed experts with PyTorch alone: one product each way for every expert that has tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import reference
from longspan.ops.types import Matrices, stacked


def add_routed_mlp(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Matrices,
    down: Matrices,
) -> None:
    """See `reference.add_routed_mlp`. Waits for the device: the host reads how many tokens each
    expert has."""
    num_chosen = experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    tokens, factors = order // num_chosen, weights.flatten()[order]
    counts = experts.flatten().bincount(minlength=gate_up.shape[0])[: gate_up.shape[0]].tolist()
    routed = torch.empty(len(order), x.shape[1], dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            part = slice(start, start + count)
            hidden = reference.silu_mul(
                F.linear(x[tokens[part]], _matrix(gate_up, expert, x.dtype)))
            routed[part] = F.linear(hidden, _matrix(down, expert, x.dtype))
        start += count
    routed[start:] = 0.0  # of experts that are not here
    routed *= factors[:, None]
    # in each token's own order, so that sums do not depend on what else is in the step
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    total = routed[places].unflatten(0, (-1, num_chosen)).sum(1)
    sums.copy_(sums.float() + total)


def _matrix(matrices: Matrices, expert: int, dtype: torch.dtype) -> Tensor:
    if isinstance(matrices, Tensor):
        return matrices[expert]
    return stacked(matrices, expert).dense().to(dtype)
