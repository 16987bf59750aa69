"""Keys and values in int8: one scale for each token and head, in plain PyTorch.

Values lose nothing by it. Keys do where a few channels are far larger than the others, as the key
biases of Qwen2.5 make them: the scale is theirs, and the others have few steps left. So a key's
channels are first divided by fixed gains, equal for the two channels of one rotation, with which
they commute. Gains are the square root of a channel's size, as weights and biases tell it, over the
usual one's, which shares the error between what is large and what is not (the idea is
SmoothQuant's, arXiv 2211.10438, but no data are needed), and powers of two, so that nothing is
rounded by them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.types import PagedKV

LEVELS = 127
"""Largest number that is stored."""


def key_gains(vectors: Tensor) -> Tensor:
    """Return gains [K, D] fp32 from how large keys are in each channel, about, before they are
    rotated: [K, D]; only ratios within a head count."""
    half = vectors.shape[-1] // 2
    pairs = vectors.float()
    size = torch.hypot(pairs[:, :half], pairs[:, half:])
    usual = size.median(-1, keepdim=True).values
    share = torch.where(usual > 0, size / usual.clamp_min(1e-30), torch.ones_like(size))
    gains = torch.exp2((0.5 * torch.log2(share.clamp(2.0**-8, 2.0**16))).round())
    return torch.cat((gains, gains), -1)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 numbers of the same shape, and scales [...] fp32. x: [..., D]."""
    x = x.float()
    scales = x.abs().amax(-1) * (1 / LEVELS)
    inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    steps = (x * inverse.unsqueeze(-1) + 0.5).floor().clamp(-LEVELS, LEVELS)
    return steps.to(torch.int8), scales


def store(
    cache: PagedKV, k: Tensor, v: Tensor, slot_mapping: Tensor, filled_blocks: Tensor,
) -> None:
    """Store rotated keys and values, [n, K, D], and the means of blocks that are full with them.

    Args:
        slot_mapping: [n] int64, all of them slots.
        filled_blocks: [m] int64, all of them blocks.
    """
    assert cache.k_scale is not None and cache.v_scale is not None and cache.k_gain is not None
    block_size = cache.k.shape[1]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    for stored, scales, new in ((cache.k, cache.k_scale, k.float() / cache.k_gain.float()),
                                (cache.v, cache.v_scale, v)):
        stored[blocks, offsets], scales[blocks, :, offsets] = quantised(new)
    if cache.k_mean is not None and cache.v_mean is not None:
        for mean, full in zip((cache.k_mean, cache.v_mean), _written_out(cache, filled_blocks),
                              strict=True):
            mean[filled_blocks] = full.mean(1).to(mean.dtype)


def dense_kv(
    cache: PagedKV, block_table: Tensor, context_len: int,
) -> tuple[PagedKV, Tensor]:
    """Write out a request's keys and values in the type that is computed in, in its scratch memory
    where there is some.

    Returns a cache of the request's blocks in order, and their table. Slots without a token hold
    anything.
    """
    table = block_table[: -(-context_len // cache.k.shape[1])]
    k, v = (part.to(cache.dtype) for part in _written_out(cache, table))
    means = (None if mean is None else mean[table] for mean in (cache.k_mean, cache.v_mean))
    return PagedKV(k, v, *means), torch.arange(len(table), device=table.device)


def _written_out(cache: PagedKV, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of some blocks, two of [n, P, K, D] fp32."""
    assert cache.k_scale is not None and cache.v_scale is not None and cache.k_gain is not None
    k, v = (stored[blocks].float() * scales[blocks].transpose(1, 2).unsqueeze(-1)
            for stored, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)))
    return k * cache.k_gain.float(), v
