"""Selection shared out by heads: each rank selects for its own heads over all queries of a slice,
then all ranks have all selections."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.attention.metadata import PrefillSlice
from longspan.attention.ranks import HeadPart, head_parts, share_heads
from longspan.ops.select.online import FACTORS
from longspan.ops.types import Budget, PagedKV, Selection

Found = tuple[Selection, Tensor | None]
"""A selection, and its recall [H, R] where that is measured."""


class Select(Protocol):
    """Selects for consecutive queries of some heads."""

    def __call__(
        self, q: Tensor, cache: PagedKV, item: PrefillSlice, start: int, part: HeadPart, /,
    ) -> Found:
        """Select. q: [T, h, D] of the part's heads, from position ``start`` on; the cache has its
        KV heads."""


def select_together(
    select: Select, budget: Budget, q: Tensor, cache: PagedKV, item: PrefillSlice, start: int,
) -> Found:
    """Select for one segment, with all ranks of the slice's group.

    q: [T, h, D], this rank's heads (`share_heads`) of all the segment's queries.
    """
    share = item.share
    assert share is not None
    num_heads, num_kv_heads = len(budget.vertical), cache.k.shape[2]
    heads = share_heads(num_heads, num_kv_heads, share.group.size)[share.group.rank]
    found = [
        select(q[:, part.heads[0] - heads[0] : part.heads[1] - heads[0]],
               of_heads(cache, slice(*part.kv_heads)), item, start, part)
        for part in head_parts(heads, num_heads // num_kv_heads)]
    assert found, "there are no more ranks than heads"
    context_len = start + q.shape[0]
    some, recall = found[0]
    columns, offsets = _widths(budget, some.tile_len, context_len)
    parts = [torch.cat([pad(one.columns, (0, columns - one.columns.shape[1]), value=-1)
                        for one, _ in found]),
             torch.cat([pad(one.offsets, (0, offsets - one.offsets.shape[1]), value=one.tile_len)
                        for one, _ in found])]
    if some.tiles is not None and some.scouts is not None:
        parts += [torch.cat([one.tiles for one, _ in found if one.tiles is not None]),
                  torch.cat([one.scouts for one, _ in found if one.scouts is not None])]
    if recall is not None:
        parts.append(torch.cat([one for _, one in found if one is not None]))
    gathered = share.from_heads(parts, num_heads, num_kv_heads)
    selection = some._replace(
        columns=gathered[0], offsets=gathered[1],
        max_columns=None if some.max_columns is None else tuple(
            min(count, context_len) for count in _largest(budget.vertical, budget)))
    if some.tiles is not None:
        selection = selection._replace(tiles=gathered[2], scouts=gathered[3])
    return selection, None if recall is None else gathered[-1]


def budget_of(budget: Budget | None, part: HeadPart | None) -> Budget:
    """Return the budget of some heads; None: of all."""
    assert budget is not None
    if part is None:
        return budget
    heads = slice(*part.heads)
    return budget._replace(vertical=budget.vertical[heads], slash=budget.slash[heads])


def of_heads(cache: PagedKV, kv_heads: slice) -> PagedKV:
    """Return the cache of some KV heads: views."""
    means = (None if mean is None else mean[:, kv_heads] for mean in (cache.k_mean, cache.v_mean))
    return PagedKV(cache.k[:, :, kv_heads], cache.v[:, :, kv_heads], *means)


def _widths(budget: Budget, tile_len: int, context_len: int) -> tuple[int, int]:
    """Return the most columns and windows that any head can get: the same on every rank."""
    columns = min(max(_largest(budget.vertical, budget)), context_len)
    slash = max(_largest(budget.slash, budget))
    if budget.mode != "tile":
        return columns, min(max(1, slash), context_len)
    forced = 1 + -(-budget.local // tile_len)
    return columns, min(-(-context_len // tile_len), max(forced, -(-slash // tile_len)))


def _largest(counts: tuple[int, ...], budget: Budget) -> tuple[int, ...]:
    factor = FACTORS[-1] if budget.recall else 1.0
    return tuple(math.ceil(factor * count) for count in counts)
