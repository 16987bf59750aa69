"""Quantised weights with PyTorch alone: the specification, and the path of CPUs and older GPUs.

Weights are dequantised for each product and multiplied in the type of the activations, which stay
as they are: exact but for that type's rounding, and slower than plain weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.types import FP8_BLOCK, INT4_TILE, Fp8Rows, Fp8Weights, Int4Weights, Quantized

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
INT4_MAX = 15
DENSE_NUMBERS = 2**23
"""Numbers that `dequantize` has in fp32 at a time."""
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


def quantize_activations(x: Tensor, group: int) -> Fp8Rows:
    """As `quantize_rows`, with one scale for each row, or for each ``group`` numbers of it, if not
    0. x: [T, K]."""
    if group:
        whole = F.pad(x.float(), (0, -x.shape[1] % group))
        values, scales = quantize_rows(whole.unflatten(1, (-1, group)))
        values, scales = values.flatten(1)[:, :x.shape[1]], scales.squeeze(2)
        return Fp8Rows(values.contiguous(), scales.t().contiguous().t(), len(x))
    values, scales = quantize_rows(x)
    return Fp8Rows(values, scales, len(x))


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


def dequantize(weights: Quantized, dtype: torch.dtype) -> Tensor:
    """Make plain numbers of a matrix [N, K] or a stack of them, rounded to ``dtype``; some rows at
    a time, so that few of them are there in fp32."""
    if len(weights.shape) > 2:
        return weights.dense().to(dtype)
    num_rows, width = weights.shape
    out = torch.empty(num_rows, width, dtype=dtype, device=weights[0].device)
    step = max(1, DENSE_NUMBERS // width // FP8_BLOCK) * FP8_BLOCK
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        if isinstance(weights, Int4Weights):
            part: Quantized = Int4Weights(weights.packed[rows], weights.scales[rows],
                                          weights.zeros[rows], weights.order)
        else:
            scale_rows = rows if not weights.is_blocked else slice(
                start // FP8_BLOCK, (start + step) // FP8_BLOCK)
            part = Fp8Weights(weights.values[rows], weights.scales[scale_rows])
        out[rows] = part.dense()
    return out


def int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None) -> Tensor:
    """x: [..., K]; weights: [N, K]; bias: [N] or None. Returns [..., N] of x's type."""
    return F.linear(x, dequantize(weights, x.dtype), bias)


def fp8_linear(x: Tensor, weights: Fp8Weights, bias: Tensor | None) -> Tensor:
    """x: [..., K]; weights: [N, K]; bias: [N] or None. Returns [..., N] of x's type."""
    return F.linear(x, dequantize(weights, x.dtype), bias)
