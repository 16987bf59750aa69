"""fp8 products by PyTorch's own kernels: activations rounded to e4m3 too, for many rows.

Row-wise scales from Ada on; blocks of 128 x 128 on Hopper, where activations have a scale for each
128 numbers. Sums are kept in two levels (``use_fast_accum`` off) where a product is long: the fast
ones of Hopper's tensor cores have 14 bits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from longspan.ops.types import FP8_BLOCK, Fp8Rows, Fp8Weights

ROW_CAPABILITY, BLOCK_CAPABILITY = (8, 9), (9, 0)
ALIGNED = 16
"""Widths and outputs are multiples."""
BLOCK_ALIGNED = 512
"""Widths of block-scaled products: rows of the weights' scales begin at multiples of 16 bytes."""
FAST_ACCUMULATION = False
_scaled_mm = getattr(torch, "_scaled_mm", None)
_scaled_grouped_mm = getattr(torch, "_scaled_grouped_mm", None)


def activation_group(weights: Fp8Weights) -> int | None:
    """Return how many numbers of a row share a scale in products with these weights, 0 for all;
    None: there is no product for them here."""
    num_columns, width = weights.values.shape
    if not weights.values.is_cuda or _scaled_mm is None or num_columns % ALIGNED or (
            width % ALIGNED):
        return None
    capability = _capability(weights.values.device)
    if not weights.is_blocked:
        return 0 if capability >= ROW_CAPABILITY else None
    is_possible = capability == BLOCK_CAPABILITY and width % BLOCK_ALIGNED == 0
    return FP8_BLOCK if is_possible and num_columns % FP8_BLOCK == 0 else None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def linear(x: Fp8Rows, weights: Fp8Weights, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply rounded rows. Returns [T, N]. Needs the scales that `activation_group` says."""
    assert _scaled_mm is not None
    out: Tensor = _scaled_mm(
        x.values, weights.values.t(), x.scales, weights.scales.t(), out_dtype=dtype,
        use_fast_accum=FAST_ACCUMULATION)
    out = out[:x.num_rows]
    return out if bias is None else out.add_(bias)


def supports_grouped(gate_up: Fp8Weights, down: Fp8Weights) -> bool:
    """Return whether experts can be multiplied by `grouped`."""
    return (_scaled_grouped_mm is not None and gate_up.values.is_cuda
            and _capability(gate_up.values.device) == BLOCK_CAPABILITY
            and all(not weights.is_blocked and weights.values.shape[2] % ALIGNED == 0
                    and weights.values.shape[1] % ALIGNED == 0 for weights in (gate_up, down)))


def grouped(values: Tensor, scales: Tensor, weights: Fp8Weights, ends: Tensor,
            dtype: torch.dtype) -> Tensor:
    """Multiply each expert's rows with its matrix.

    values: [R, K] e4m3; scales: [R] fp32; weights: [E, N, K] by rows; ends: [E] int32, where each
    expert's rows end. Returns [R, N].
    """
    assert _scaled_grouped_mm is not None
    out: Tensor = _scaled_grouped_mm(
        values, weights.values.transpose(1, 2), scales, weights.scales.squeeze(2), offs=ends,
        out_dtype=dtype, use_fast_accum=True)
    return out
