"""Quantised weights with PyTorch alone: the specification, and the path of CPUs and older GPUs.

Weights are dequantised for each product and multiplied in the type of the activations, which stay
as they are: exact but for that type's rounding, and slower than plain weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.types import FP8_BLOCK, INT4_TILE, Fp8Weights, Int4Weights

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
INT4_MAX = 15
TINY = 1e-12
"""Smallest scale: rows of zeros have it."""


def quantize_rows(x: Tensor) -> Fp8Weights:
    """Round rows to e4m3, each with the scale that takes its largest number to the largest of e4m3.

    x: [..., K]. Returns values of the same shape and scales [..., 1] fp32.
    """
    numbers = x.float()
    scales = (numbers.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(TINY)
    # PyTorch's conversion makes NaN of what rounds to more than the largest number
    values = (numbers / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return Fp8Weights(values, scales)


def quantize_blocks(x: Tensor) -> Fp8Weights:
    """As `quantize_rows`, with one scale for each block of 128 x 128. x: [N, K]."""
    num_rows, width = x.shape
    rows, columns = -(-num_rows // FP8_BLOCK), -(-width // FP8_BLOCK)
    padded = F.pad(x.float(), (0, columns * FP8_BLOCK - width, 0, rows * FP8_BLOCK - num_rows))
    largest = padded.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).abs().amax((1, 3))
    scales = (largest / E4M3_MAX).clamp_min(TINY)
    whole = scales.repeat_interleave(FP8_BLOCK, 0)[:num_rows].repeat_interleave(FP8_BLOCK, 1)
    values = (x.float() / whole[:, :width]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return Fp8Weights(values, scales)


def quantize_int4(x: Tensor, group: int) -> Int4Weights:
    """Round groups of a row to 16 steps from their least to their largest number, 0 among them.

    x: [..., K], finite.
    """
    groups = x.float().unflatten(-1, (-1, group))
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    # rounded as it is kept, so that the numbers are rounded to what they will stand for
    least = torch.finfo(torch.float16).smallest_normal
    scales = ((high - low) / INT4_MAX).clamp(least, torch.finfo(torch.float16).max).half()
    zeros = (-low / scales.float()).round().clamp(0, INT4_MAX)
    numbers = (groups / scales.float() + zeros).round().clamp(0, INT4_MAX).to(torch.uint8)
    return Int4Weights(
        pack_int4(numbers.flatten(-2)), scales.squeeze(-1), zeros.squeeze(-1).to(torch.uint8))


def pack_int4(numbers: Tensor) -> Tensor:
    """Pack [..., K] uint8, 0 to 15, as `Int4Weights` has them."""
    low, high = numbers.unflatten(-1, (-1, 2, INT4_TILE // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None) -> Tensor:
    """x: [..., K]; weights: [N, K]; bias: [N] or None. Returns [..., N] of x's type."""
    return F.linear(x, weights.dense().to(x.dtype), bias)


def fp8_linear(x: Tensor, weights: Fp8Weights, bias: Tensor | None) -> Tensor:
    """x: [..., K]; weights: [N, K]; bias: [N] or None. Returns [..., N] of x's type."""
    return F.linear(x, weights.dense().to(x.dtype), bias)
