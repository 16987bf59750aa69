"""Quantised weights made plain (Triton), for products that multiply plain ones: many rows.

One matrix, or a stack of them, into a scratch of bf16: for thousands of rows it costs a per cent of
the product that follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.types import FP8_BLOCK, Fp8Weights, Int4Weights, Quantized

TILE = 1_024
"""Numbers of a row that a program makes, twice that for int4."""


def dequantize(weights: Quantized, dtype: torch.dtype) -> Tensor:
    """See `eager.dequantize`."""
    return _int4(weights, dtype) if isinstance(weights, Int4Weights) else _fp8(weights, dtype)


def _fp8(weights: Fp8Weights, dtype: torch.dtype) -> Tensor:
    values, scales = weights
    num_rows, width = values.shape[-2:]
    assert values.is_contiguous() and scales.is_contiguous()
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    _dense_fp8[(values.numel() // width, triton.cdiv(width, TILE))](
        values, scales, out, num_rows, width, scales.shape[-2], scales.shape[-1],
        BLOCK=FP8_BLOCK, IS_BLOCKED=weights.is_blocked, TILE=TILE, num_warps=4)
    return out


def _int4(weights: Int4Weights, dtype: torch.dtype) -> Tensor:
    packed, scales, zeros, order = weights
    width = weights.shape[-1]
    assert packed.is_contiguous() and scales.is_contiguous() and zeros.is_contiguous()
    out = torch.empty(weights.shape, dtype=dtype, device=packed.device)
    _dense_int4[(packed.numel() * 2 // width, triton.cdiv(width // 2, TILE))](
        packed, scales, zeros, out if order is None else order, out, width, weights.group,
        HAS_ORDER=order is not None, TILE=TILE, num_warps=4)
    return out


@triton.jit
def _dense_fp8(
    values, scales, out, num_rows, width, scale_rows, scale_columns,
    BLOCK: tl.constexpr, IS_BLOCKED: tl.constexpr, TILE: tl.constexpr,
):
    """Make a part of one row, of one matrix in the stack."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < width
    value = tl.load(values + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    if IS_BLOCKED:
        scale_row = row // num_rows * scale_rows + row % num_rows // BLOCK
        value *= tl.load(scales + scale_row * scale_columns + columns // BLOCK, mask=mask,
                         other=0.0)
    else:
        value *= tl.load(scales + row)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dense_int4(
    packed, scales, zeros, order, out, width, group, HAS_ORDER: tl.constexpr, TILE: tl.constexpr,
):
    """Make a part of one row: octets of low and high halves."""
    row = tl.program_id(0).to(tl.int64)
    octets = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = octets < width // 2
    pairs = tl.load(packed + row * (width // 2) + octets, mask=mask, other=0).to(tl.int32)
    low = octets // 16 * 32 + octets % 16
    for part in tl.static_range(2):
        columns = low + 16 * part
        place = row * (width // group) + columns // group
        scale = tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, mask=mask, other=0).to(tl.int32)
        number = ((pairs >> 4 * part) & 15) - zero
        target = tl.load(order + columns, mask=mask, other=0) if HAS_ORDER else columns
        tl.store(out + row * width + target,
                 (number.to(tl.float32) * scale).to(out.dtype.element_ty), mask=mask)
