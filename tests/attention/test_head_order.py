"""Which KV groups ranks have: as many for each, and the slowest as fast as can be."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from longspan.attention.head_order import EXACT, balance, kv_groups
from longspan.attention.sparsity import SparsityPlan


def most(parts: tuple[tuple[int, ...], ...], costs: list[int]) -> int:
    return max(sum(costs[item] for item in part) for part in parts)


@pytest.mark.parametrize(("count", "size"), [(2, 2), (4, 2), (4, 4), (6, 3), (8, 2), (8, 4)])
def test_no_division_of_few_is_better(count: int, size: int) -> None:
    rng = random.Random(count * size)
    for _ in range(3):
        costs = [rng.randrange(1, 1000) for _ in range(count)]
        found = balance(costs, size)
        assert sorted(item for part in found for item in part) == list(range(count))
        assert {len(part) for part in found} == {count // size}
        assert all(part == tuple(sorted(part)) for part in found)
        width = count // size
        # the order within a part is of no matter: a sample of orders when there are many
        orders = permutations(range(count)) if count <= 6 else (
            rng.sample(range(count), count) for _ in range(3000))
        assert most(found, costs) <= min(most(tuple(
            tuple(order[index : index + width]) for index in range(0, count, width)), costs)
            for order in orders)


def test_many_are_divided_nearly_as_well() -> None:
    rng = random.Random(1)
    costs = [rng.randrange(100, 1000) for _ in range(4 * EXACT)]
    found = balance(costs, EXACT)
    assert sorted(item for part in found for item in part) == list(range(len(costs)))
    assert {len(part) for part in found} == {4}
    assert most(found, costs) < 1.1 * sum(costs) / EXACT


def test_heads_keep_their_group_and_follow_the_budgets() -> None:
    plan = SparsityPlan(vertical=((9, 9, 8, 8, 1, 1, 1, 1), (5,) * 8), slash=((1,) * 8, (5,) * 8))
    assert kv_groups(plan, 0, 4, 2) == ((0, 2), (1, 3))
    assert kv_groups(plan, 1, 4, 2) == ((0, 1), (2, 3))
    assert kv_groups(None, 0, 4, 2) == ((0, 1), (2, 3))
    assert kv_groups(plan, 0, 4, 1) == ((0, 1, 2, 3),)
