"""Quantised weights with PyTorch alone: the specification, and the path of CPUs and older GPUs.

Weights are dequantised for each product and multiplied in the type of the activations, which stay
as they are: exact but for that type's rounding, and slower than plain weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.types import Fp8Weights

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
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


def fp8_linear(x: Tensor, weights: Fp8Weights, bias: Tensor | None) -> Tensor:
    """x: [..., K]; weights: [N, K]; bias: [N] or None. Returns [..., N] of x's type."""
    return F.linear(x, weights.dense().to(x.dtype), bias)
