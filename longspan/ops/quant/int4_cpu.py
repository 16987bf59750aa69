"""Int4 weights on CPUs, by PyTorch's own int4 product.

Groups of a row share a scale and a middle: a number q stands for (q - 8) * scale + middle.
Activations, scales and results are bfloat16, sums fp32. Decoding reads half of what int8 does; with
many rows the product takes as long as int8's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS, MIDDLE = 15, 8
SHRUNK = (1.0, 0.95, 0.9, 0.85)
"""Shares of a group's range that are tried: with less of it, steps are finer for all but its
extremes."""
TINY = 1e-30
_product = torch.ops.aten._weight_int4pack_mm_for_cpu
_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu


class PackedInt4(NamedTuple):
    """A matrix [N, K] as the product reads it."""

    numbers: Tensor
    """[N, K / 2] uint8, in an order that the CPU decides."""
    scales: Tensor
    """[K / G, N, 2] bf16: scale and middle of each group."""

    @property
    def group(self) -> int:
        """Numbers in a group."""
        return 2 * self.numbers.shape[1] // self.scales.shape[0]


def quantize(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round groups of a row to 16 steps, by the least square error among `SHRUNK`.

    x: [N, K], finite. Returns numbers [N, K] uint8 and scales [K / G, N, 2] bf16.
    """
    groups = x.float().unflatten(1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    centre, reach = (low + high) / 2, (high - low) / 2
    best = torch.full_like(low, torch.inf)
    numbers = torch.empty(groups.shape, dtype=torch.uint8)
    scales = torch.empty(*low.shape[:2], 2, dtype=torch.bfloat16)
    for share in SHRUNK:
        # rounded as they are kept, so that numbers are rounded to what they will stand for
        step = (reach * (2 * share / LEVELS)).clamp_min(TINY).bfloat16()
        middle = (centre - share * reach + MIDDLE * step.float()).bfloat16()
        rounded = ((groups - middle.float()) / step.float() + MIDDLE).round_().clamp_(0, LEVELS)
        stands_for = (rounded - MIDDLE).mul_(step.float()).add_(middle.float())
        error = stands_for.sub_(groups).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        numbers = torch.where(better, rounded.to(torch.uint8), numbers)
        scales = torch.where(better, torch.cat((step, middle), -1), scales)
    return numbers.flatten(1), scales.transpose(0, 1).contiguous()


def pack(numbers: Tensor, scales: Tensor) -> PackedInt4:
    """Lay a matrix out for `linear`. numbers, scales: as `quantize` returns them."""
    return PackedInt4(_pack(numbers.int(), 1), scales)


def linear(x: Tensor, packed: PackedInt4) -> Tensor:
    """Return x W^T. x: [T, K]; returns [T, N] bf16."""
    out: Tensor = _product(x.bfloat16(), packed.numbers, packed.group, packed.scales)
    return out
