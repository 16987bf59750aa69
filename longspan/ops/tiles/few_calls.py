"""Pointwise work on CPUs with as few and as cheap calls as there are.

A decode step reads all weights, so that nothing stays in the caches: each small operation between
two products costs PyTorch five to ten microseconds there, and a step has a thousand of them on one
core while the others wait. NumPy takes a quarter of that for a few rows, whose memory it shares.
Results are those of `reference`, to the rounding of sums and fused multiply-adds.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import reference
from longspan.ops.types import PagedKV, QueryRotary

as_pytorch = np.errstate(all="ignore")
"""NumPy warns of infinities and NaN; whoever samples looks for them, as after PyTorch's work."""
FEW_NUMBERS = 32_768
"""Up to so many numbers NumPy is faster: beyond, PyTorch divides the work among threads."""


def takes_numpy(x: Tensor) -> bool:
    """Return whether NumPy computes with ``x``: a few plain numbers without gradients."""
    return (x.numel() <= FEW_NUMBERS and x.dtype == torch.float32 and x.device.type == "cpu"
            and not x.requires_grad)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if x.dtype != torch.float32:  # PyTorch's own would round elsewhere
        return reference.rms_norm(x, weight, eps)
    if not takes_numpy(x):
        return F.rms_norm(x, weight.shape, weight, eps)
    return torch.from_numpy(_normed(x.numpy(), weight.detach().numpy(), eps))


@as_pytorch
def _normed(rows: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    squares = np.einsum("...i,...i->...", rows, rows)[..., None]
    out = rows / np.sqrt(squares * (1 / rows.shape[-1]) + eps)
    out *= weight
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    residual += x
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`. Without gradients."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotate`. Without gradients."""
    if x.dtype != torch.float32:
        return reference.rotate(x, cos, sin)
    if takes_numpy(x):
        return torch.from_numpy(_turned(x, cos.numpy(), sin.numpy()))
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
    if takes_numpy(k):
        places = positions.numpy() % rotary.stride
        k = torch.from_numpy(_turned(k, rotary.cos.numpy()[places], rotary.sin.numpy()[places]))
    else:
        rows = positions % rotary.stride
        k = rotate(k, rotary.cos[rows], rotary.sin[rows])
    for stored, new, mean in ((cache.k, k, cache.k_mean), (cache.v, v, cache.v_mean)):
        if len(slot_mapping) == 1:
            block, offset = divmod(int(slot_mapping), stored.shape[1])
            stored[block, offset].copy_(new[0])
        else:
            stored.flatten(0, 1).index_copy_(0, slot_mapping, new.to(stored.dtype))
        if mean is not None and len(filled_blocks):
            mean[filled_blocks] = stored[filled_blocks].float().mean(1).to(mean.dtype)


@as_pytorch
def _turned(x: Tensor, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    rows, half = x.numpy(), x.shape[-1] // 2
    first, second = rows[..., :half], rows[..., half:]
    cosine, sine = cos[..., None, :], sin[..., None, :]
    out = np.empty(rows.shape, np.float32)
    np.multiply(first, cosine, out=out[..., :half])
    out[..., :half] -= second * sine
    np.multiply(second, cosine, out=out[..., half:])
    out[..., half:] += first * sine
    return out
