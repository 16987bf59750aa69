"""A KV cache that ranks divide among themselves: each has an equal part of every block's tokens.

With blocks of P tokens and n ranks, rank r has tokens r P / n ... (r + 1) P / n - 1 of each. So ids
of blocks mean the same everywhere, no rank has more than another, and whoever hands blocks out
knows nothing of it. Prefill collects one layer's keys and values of a request at a time and
computes as if they had been here; decode attends to what is here, and parts are merged by their
LSEs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.ranks import RankGroup
from longspan.ops.types import KeySpans, PagedKV


def held_slots(slots: Tensor, block_len: int, group: RankGroup) -> Tensor:
    """Return this rank's places for slots of whole blocks, -1 for what others hold. [n] int64."""
    part_len = block_len // group.size
    offsets = slots % block_len
    is_here = (slots >= 0) & (offsets // part_len == group.rank)
    return torch.where(is_here, slots // block_len * part_len + offsets % part_len, -1)


def held_keys(context_lens: Tensor, block_len: int, group: RankGroup) -> KeySpans:
    """Return which keys of B requests are here, all of them to be attended to. context_lens: [B]
    int64, on any device."""
    part_len = block_len // group.size
    start = group.rank * part_len
    counts = context_lens // block_len * part_len + (
        context_lens % block_len - start).clamp(0, part_len)
    return KeySpans(torch.zeros_like(counts), counts, block_len, start)


def collect(
    group: RankGroup, cache: PagedKV, block_table: Tensor, *, means: bool,
) -> tuple[PagedKV, Tensor]:
    """Collect a request's keys and values in one layer, on every rank.

    Args:
        block_table: [n] int64
        means: with each block's mean key and mean value; of the last one, if it is not full, they
            are as meaningless as ever.

    Returns a cache of whole blocks in order, and their table.
    """
    k, v = (_whole(group.gather(part[block_table])) for part in (cache.k, cache.v))
    mean = (part.mean(1, dtype=torch.float32).to(part.dtype) if means else None for part in (k, v))
    return PagedKV(k, v, *mean), torch.arange(len(block_table), device=block_table.device)


def _whole(parts: Tensor) -> Tensor:
    """[ranks, n, P / ranks, K, D] to [n, P, K, D]."""
    return parts.transpose(0, 1).flatten(1, 2)
