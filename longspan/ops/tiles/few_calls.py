"""Pointwise work on CPUs with as few calls as PyTorch allows.

A decode step reads all weights, so that nothing stays in the caches: each small operation between
two products costs ten microseconds there, and a step has a thousand of them on one core while the
others wait. Results are those of `reference`, to the rounding of a fused multiply-add in `rotate`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import reference
from longspan.ops.types import PagedKV, QueryRotary


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if x.dtype != torch.float32:  # PyTorch's own would round elsewhere
        return reference.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    residual += x
    return rms_norm(residual, weight, eps), residual


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotate`. Without gradients."""
    if x.dtype != torch.float32:
        return reference.rotate(x, cos, sin)
    out = torch.empty(x.shape, device=x.device)
    first, second = x.chunk(2, -1)
    out_first, out_second = out.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def store_kv(
    cache: PagedKV, k: Tensor, v: Tensor, positions: Tensor, slot_mapping: Tensor,
    filled_blocks: Tensor, rotary: QueryRotary,
) -> None:
    """See `reference.store_kv`; every row is stored."""
    rows = positions % rotary.stride
    k = rotate(k, rotary.cos[rows], rotary.sin[rows])
    for stored, new, mean in ((cache.k, k, cache.k_mean), (cache.v, v, cache.v_mean)):
        stored.flatten(0, 1).index_copy_(0, slot_mapping, new.to(stored.dtype))
        if mean is not None and len(filled_blocks):
            mean[filled_blocks] = stored[filled_blocks].float().mean(1).to(mean.dtype)
