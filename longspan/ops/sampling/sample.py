"""Choose the next tokens: greedy, temperature, top-k, top-p, min-p. No host sync inside.

Random numbers are a hash of (seed, position), one for each row, so that a request's completion does
not depend on what else is in the batch, on the step, or on the device's generator state.
Shape legend: B rows (requests), V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9, constants of SplitMix64
MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
NO_TOKEN = -1
"""In place of a token id: none could be chosen."""


class SamplingRows(NamedTuple):
    """Parameters of B rows, on the device of the logits."""

    temperature: Tensor
    """[B] fp32; 0: greedy."""
    top_k: Tensor
    """[B] int64; 0: all."""
    top_p: Tensor
    """[B] fp32; 1: all."""
    min_p: Tensor
    """[B] fp32; 0: all."""
    seed: Tensor
    """[B] int64"""
    position: Tensor
    """[B] int64, the place of the new token in its request: the counter of the random numbers."""


def sample(logits: Tensor, rows: SamplingRows, *, all_greedy: bool) -> Tensor:
    """Sample the next token of each row.

    Args:
        logits: [B, V] fp32; -inf for tokens that may not come.
        all_greedy: every temperature is 0, known on the host; skips the sort.

    The filters apply in this order, each to what the one before left: temperature, top-k, top-p
    (the smallest set that reaches it), min-p (a fraction of the best one's probability). The best
    token always stays. Returns [B] int64, `NO_TOKEN` where logits are NaN or infinite.
    """
    best, greedy = logits.max(dim=-1)  # NaN where there is one
    # Few launches: a finite number minus itself is 0, and nothing else is.
    greedy.masked_fill_(best - best != 0, NO_TOKEN)
    if all_greedy:
        return greedy
    is_greedy = rows.temperature <= 0
    heat = torch.where(is_greedy, torch.ones_like(rows.temperature), rows.temperature)
    # Shifted to a maximum of 0 first, so that tiny temperatures do not overflow.
    scaled = (logits - best[:, None]) / heat[:, None]
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    mass = _filtered(scaled, rows).double().cumsum(dim=-1)
    target = uniform(rows.seed, rows.position)[:, None] * mass[:, -1:]
    rank = torch.searchsorted(mass, target, right=True).clamp_max(logits.shape[-1] - 1)
    return torch.where(is_greedy | (greedy < 0), greedy, order.gather(1, rank)[:, 0])


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Draw uniform numbers in [0, 1) from a hash of seed and position. [B] int64 twice to [B]
    fp64."""
    bits = _mix(_mix(seed + GOLDEN) + position * GOLDEN)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def _filtered(scaled: Tensor, rows: SamplingRows) -> Tensor:
    """Return the probabilities in descending order, 0 where a filter drops the token. [B, V] to
    [B, V]."""
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    in_top_k = (rank < rows.top_k[:, None]) | (rows.top_k[:, None] == 0)
    probs = scaled.masked_fill(~in_top_k, -torch.inf).softmax(dim=-1)
    before = probs.double().cumsum(dim=-1) - probs
    # top_p 1 must keep everything: rounding may bring the sum of the others to 1 early.
    in_top_p = (before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    in_min_p = probs >= rows.min_p[:, None] * probs[:, :1]
    keep = (in_top_p & in_min_p) | (rank == 0)
    return probs.masked_fill(~keep, 0.0)


def _mix(bits: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser to wrapping signed integers; shifts are made logical by
    masks."""
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * MIX_1
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * MIX_2
    return bits ^ ((bits >> 31) & (2**33 - 1))
