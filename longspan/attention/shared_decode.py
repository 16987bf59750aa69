"""Decode steps whose keys several ranks share out: each attends to its share of every request's
blocks, and the parts are merged by their LSEs.

Where the ranks' caches are the same, which rank reads which blocks is decided anew in every step,
from the lengths alone; where they divide each block among themselves, a rank reads what it has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longspan import ops
from longspan.attention.divided_kv import held_keys
from longspan.attention.ranks import RankGroup, RowSharing
from longspan.ops.types import KeySpans, PagedKV

LEAST_BYTES = {"cpu": 2**21, "cuda": 2**28}
"""Keys and values of one layer that it takes this long to read as ranks need for an exchange."""


class KeyShare(NamedTuple):
    """Keys of one step that are this rank's."""

    group: RankGroup
    spans: KeySpans

    def merge(self, out: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
        """Merge what the ranks found, each among its keys. out: [B, H, D], 0 without keys; lse:
        [B, H], -inf without. Returns [B, H, D] in ``dtype``."""
        parts = self.group.gather(torch.cat((out.float().flatten(), lse.flatten())))
        outs, lses = parts.split([out.numel(), lse.numel()], 1)
        return ops.merge_parts(
            outs.unflatten(1, out.shape), lses.unflatten(1, lse.shape), dtype)[0]


def least_keys(cache: PagedKV) -> int:
    """Return how many keys a step's decodes must see for ranks to share them; see `RowSharing`."""
    own = cache.k[0, 0].numel() * cache.k.element_size()
    return -(-LEAST_BYTES[cache.k.device.type] // (2 * own))


def share_keys(sharing: RowSharing, context_lens: Tensor, block_size: int) -> KeyShare:
    """Share out the keys of B requests: those that a rank holds, or where all do, whole blocks to a
    rank. context_lens: [B] int64, on any device."""
    group = sharing.group
    if sharing.divides_kv:
        return KeyShare(group, held_keys(context_lens, block_size, group))
    blocks = (context_lens + block_size - 1) // block_size
    first, stop = (torch.minimum(blocks * rank // group.size * block_size, context_lens)
                   for rank in (group.rank, group.rank + 1))
    return KeyShare(group, KeySpans(first, stop - first))
