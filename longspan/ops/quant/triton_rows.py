"""Activations rounded to e4m3 (Triton), alone or where they are made: behind a norm or SwiGLU.

Numbers are rounded to the activations' own type first, so that a fused kernel gives what the two
steps would. Nothing is read on the host: graph capture is safe.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.tiles.rows import normed_rows
from longspan.ops.types import FP8_BLOCK, Fp8Rows

E4M3_MAX, TINY = tl.constexpr(448.0), tl.constexpr(1e-12)
TILE = 2_048
"""Numbers of a row that a program holds at a time."""
NORM_TILE = 4_096
PADDED_ROWS = 16
"""Rows are allocated in multiples: block-scaled products want a multiple of four."""


def quantize(x: Tensor, group: int) -> Fp8Rows:
    """See `eager.quantize_activations`. x: [T, K], the last axis contiguous."""
    return _launch(x, x.shape[1], group, has_gate=False)


def silu_mul(gate_up: Tensor, group: int) -> Fp8Rows:
    """Round ``reference.silu_mul(gate_up)``. gate_up: [T, 2F], the last axis contiguous."""
    return _launch(gate_up, gate_up.shape[1] // 2, group, has_gate=True)


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: int
) -> Fp8Rows:
    """Round `reference.rms_norm`, or `reference.add_rms_norm` where there is a residual, which is
    changed in place. x: [T, M], the last axis contiguous."""
    num_rows, dim = x.shape
    assert x.stride(1) == 1 and (residual is None or residual.is_contiguous())
    out, width = allocate(num_rows, dim, group, x.device), triton.next_power_of_2(dim)
    rows = max(1, NORM_TILE // width)
    assert group == 0 or dim % group == 0 and width % group == 0
    if num_rows:
        _norm_rows[(triton.cdiv(num_rows, rows),)](
            x, x if residual is None else residual, weight, out.values, out.scales, num_rows, dim,
            x.stride(0), out.scales.stride(1), eps, HAS_RESIDUAL=residual is not None, GROUP=group,
            ROWS=rows, WIDTH=width, num_warps=4 if rows * width <= 2_048 else 8)
    return out


def allocate(num_rows: int, width: int, group: int, device: torch.device) -> Fp8Rows:
    """Make room for rows; see `Fp8Rows`."""
    padded = triton.cdiv(num_rows, PADDED_ROWS) * PADDED_ROWS
    values = torch.empty(padded, width, dtype=torch.float8_e4m3fn, device=device)
    groups = triton.cdiv(width, group) if group else 1
    scales = torch.empty(groups, padded, dtype=torch.float32, device=device)
    return Fp8Rows(values, scales.t(), num_rows)


def _launch(x: Tensor, width: int, group: int, *, has_gate: bool) -> Fp8Rows:
    assert x.ndim == 2 and x.stride(1) == 1 and group in (0, FP8_BLOCK)
    out = allocate(x.shape[0], width, group, x.device)
    if group == 0 and not has_gate and width <= NORM_TILE:
        _launch_narrow(x, out)
        return out
    tile = min(TILE, max(FP8_BLOCK, triton.next_power_of_2(width)))
    tiles = triton.cdiv(width, tile) if group else 1
    if x.shape[0]:
        _quantize_rows[(x.shape[0], tiles)](
            x, out.values, out.scales, width, x.stride(0), out.scales.stride(1),
            HAS_GATE=has_gate, GROUP=group, TILE=tile, num_warps=4)
    return out


def _launch_narrow(x: Tensor, out: Fp8Rows) -> None:
    num_rows, width = x.shape
    padded = triton.next_power_of_2(width)
    rows = max(1, NORM_TILE // padded)
    if num_rows:
        _round_rows[(triton.cdiv(num_rows, rows),)](
            x, out.values, out.scales, num_rows, width, x.stride(0), ROWS=rows, WIDTH=padded,
            num_warps=4)


@triton.jit
def _load(x, row, columns, width, row_stride, HAS_GATE: tl.constexpr):
    """Load numbers of one row, through SwiGLU where there is a gate."""
    mask = columns < width
    start = x + row * row_stride + columns
    value = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        up = tl.load(start + width, mask=mask, other=0.0).to(tl.float32)
        value = value / (1 + tl.exp(-value)) * up
        value = value.to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _rounded(values, scales):
    """Divide and round to e4m3, whose largest number nothing exceeds."""
    scaled = tl.minimum(tl.maximum(values / scales, -E4M3_MAX), E4M3_MAX)
    return scaled.to(tl.float8e4nv)


@triton.jit
def _quantize_rows(
    x, out, scales, width, row_stride, scale_stride,
    HAS_GATE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):
    """Round one row, twice over it for its largest number, or groups of a tile of it."""
    row = tl.program_id(0).to(tl.int64)
    if GROUP == 0:
        largest = tl.zeros([TILE], tl.float32)
        for first in tl.range(0, width, TILE):
            columns = first + tl.arange(0, TILE)
            largest = tl.maximum(
                largest, tl.abs(_load(x, row, columns, width, row_stride, HAS_GATE)))
        scale = tl.maximum(tl.max(largest, 0) / E4M3_MAX, TINY)
        tl.store(scales + row, scale)
        for first in tl.range(0, width, TILE):
            columns = first + tl.arange(0, TILE)
            value = _load(x, row, columns, width, row_stride, HAS_GATE)
            tl.store(out + row * width + columns, _rounded(value, scale), mask=columns < width)
    else:
        groups: tl.constexpr = TILE // GROUP
        columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
        value = _load(x, row, columns, width, row_stride, HAS_GATE)
        value = tl.reshape(value, [groups, GROUP])
        scale = tl.maximum(tl.max(tl.abs(value), 1) / E4M3_MAX, TINY)
        numbers = tl.program_id(1) * groups + tl.arange(0, groups)
        tl.store(scales + numbers.to(tl.int64) * scale_stride + row, scale,
                 mask=numbers * GROUP < width)
        rounded = tl.reshape(_rounded(value, scale[:, None]), [TILE])
        tl.store(out + row * width + columns, rounded, mask=columns < width)


@triton.jit(do_not_specialize=["num_rows"])
def _round_rows(
    x, out, scales, num_rows, width, row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Round some whole rows, which are read once."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    values = tl.load(x + row[:, None] * row_stride + column[None, :], mask=mask,
                     other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 1) / E4M3_MAX, TINY)
    tl.store(scales + row, scale, mask=row < num_rows)
    tl.store(out + row[:, None] * width + column[None, :], _rounded(values, scale[:, None]),
             mask=mask)


@triton.jit
def _norm_rows(
    x, residual, weight, out, scales, num_rows, dim, row_stride, scale_stride, eps,
    HAS_RESIDUAL: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Norm of some rows, rounded."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = (row < num_rows)[:, None] & (column < dim)[None, :]
    place = row[:, None] * dim + column[None, :]
    values = tl.load(x + row[:, None] * row_stride + column[None, :], mask=mask,
                     other=0.0).to(tl.float32)
    values = normed_rows(values, residual, weight, place, column, mask, dim, eps,
                         x.dtype.element_ty, HAS_RESIDUAL).to(tl.float32)
    if GROUP == 0:
        scale = tl.maximum(tl.max(tl.abs(values), 1) / E4M3_MAX, TINY)
        tl.store(scales + row, scale, mask=row < num_rows)
        tl.store(out + place, _rounded(values, scale[:, None]), mask=mask)
    else:
        groups: tl.constexpr = WIDTH // GROUP
        parts = tl.reshape(values, [ROWS, groups, GROUP])
        scale = tl.maximum(tl.max(tl.abs(parts), 2) / E4M3_MAX, TINY)
        numbers = tl.arange(0, groups)
        tl.store(scales + numbers[None, :].to(tl.int64) * scale_stride + row[:, None], scale,
                 mask=(row < num_rows)[:, None] & (numbers * GROUP < dim)[None, :])
        rounded = tl.reshape(_rounded(parts, scale[:, :, None]), [ROWS, WIDTH])
        tl.store(out + place, rounded, mask=mask)
