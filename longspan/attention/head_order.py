"""Which KV groups each rank has where ranks share the heads: heads keep different numbers of keys,
and all ranks wait for the one whose heads keep most. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from longspan.attention.sparsity import SparsityPlan

EXACT = 8
"""Up to so many groups all divisions are compared."""


def kv_groups(
    plan: SparsityPlan | None, layer_idx: int, num_kv_heads: int, num_ranks: int,
) -> tuple[tuple[int, ...], ...]:
    """Return the KV heads of each rank in a layer, ascending, equally many for all: those by which
    the budgets of the rank that has most are least. Without budgets they are consecutive."""
    size = num_kv_heads // num_ranks
    if plan is None:
        return tuple(tuple(range(rank * size, (rank + 1) * size)) for rank in range(num_ranks))
    budget = plan.layer(layer_idx)
    group = len(budget.vertical) // num_kv_heads
    kept = [vertical + slash for vertical, slash in zip(budget.vertical, budget.slash, strict=True)]
    return balance([sum(kept[head * group : (head + 1) * group]) for head in range(num_kv_heads)],
                   num_ranks)


def balance(costs: Sequence[int], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Divide items among ranks, equally many to each, so that the largest sum of costs is as small
    as can be; of many items, nearly. Returns the items of each rank, ascending."""
    every = list(range(len(costs)))
    if len(costs) <= EXACT:
        return _best(every, costs, num_ranks)[1]
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    size = len(costs) // num_ranks
    for item in sorted(every, key=lambda one: -costs[one]):  # the largest first, to whom has least
        open_parts = [part for part in parts if len(part) < size]
        min(open_parts, key=lambda part: sum(costs[one] for one in part)).append(item)
    return tuple(tuple(sorted(part)) for part in parts)


def _best(
    items: list[int], costs: Sequence[int], num_ranks: int,
) -> tuple[int, tuple[tuple[int, ...], ...]]:
    if num_ranks == 1:
        return sum(costs[item] for item in items), (tuple(items),)
    first, rest = items[0], items[1:]
    best: tuple[int, tuple[tuple[int, ...], ...]] | None = None
    for companions in combinations(rest, len(items) // num_ranks - 1):
        own = costs[first] + sum(costs[item] for item in companions)
        if best is not None and own >= best[0]:
            continue
        most, parts = _best([item for item in rest if item not in companions], costs, num_ranks - 1)
        if best is None or max(own, most) < best[0]:
            best = max(own, most), ((first, *companions), *parts)
    assert best is not None
    return best
