"""Pipelines as arithmetic: flow through stages, split of layers, cuts of dense prompts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from random import Random

import pytest

from longspan.engine.control.stage_plan import (
    DenseCosts,
    equal_split,
    flow,
    plan_dense,
    split_by_time,
)

COSTS = DenseCosts(terms=(2e-3, 2e-5, 3e-10), stage_shares=(0.25,) * 4, unit_len=128,
                   shortest=1_024, longest=32_768)


def test_chunks_pass_one_behind_another() -> None:
    found = flow([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], [0.5] * 3)
    assert found.begun_s == ((0.0, 1.5), (1.0, 3.5), (2.0, 5.5))
    assert found.total_s == 7.5
    assert found.busy_s(0) == 3.0 and found.busy_s(1) == 6.0
    assert found.idle(0) == pytest.approx(0.6) and found.idle(1) == pytest.approx(0.2)


def test_few_chunks_in_flight_hold_the_first_stage_back() -> None:
    times = [[1.0, 1.0, 1.0]] * 6
    assert flow(times).total_s == 8.0
    assert flow(times, max_in_flight=4).total_s == 8.0
    assert flow(times, max_in_flight=1).total_s == 18.0  # a pipeline that never fills
    assert flow(times, max_in_flight=2).begun_s[2] == (3.0, 4.0, 5.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_the_best_of_all(seed: int) -> None:
    random = Random(seed)
    times = [random.uniform(0.5, 2) for _ in range(8)] + [0.02]
    for count in (1, 2, 3, 4):
        stages = split_by_time(times, count)
        assert [layer for stage in stages for layer in stage] == list(range(9))
        slowest = max(sum(times[stage.start:stage.stop]) for stage in stages)
        every = [cuts for cuts in product(range(1, 9), repeat=count - 1)
                 if all(left < right for left, right in pairwise(cuts))]
        assert slowest == pytest.approx(min(
            max(sum(times[start:stop]) for start, stop in pairwise((0, *cuts, 9)))
            for cuts in every))


@pytest.mark.parametrize(("num_layers", "num_stages", "lens"), [
    (5, 1, [5]), (5, 2, [2, 3]), (7, 3, [2, 2, 3]), (4, 4, [1, 1, 1, 1]), (28, 8, [
        4, 4, 4, 4, 4, 4, 3, 1])])
def test_equal_stages(num_layers: int, num_stages: int, lens: list[int]) -> None:
    assert [len(part) for part in equal_split(num_layers, num_stages)] == lens


def test_the_last_layer_comes_as_an_extra() -> None:
    assert [len(stage) for stage in split_by_time([1.0] * 8 + [0.02], 4)] == [2, 2, 2, 3]


@pytest.mark.parametrize(("start", "stop"), [
    (0, 131_072), (0, 1_000_000), (77, 131_000), (900_000, 1_000_000), (0, 1), (500, 1_400)])
def test_dense_plans_cover_the_prompt_in_chunks_of_equal_time(start: int, stop: int) -> None:
    ends = plan_dense(COSTS, start, stop)
    cuts = list(pairwise((start, *ends)))
    assert ends[-1] == stop and all(begin < end for begin, end in cuts)
    assert all(end % 128 == 0 for end in ends[:-1])
    assert all(end - begin <= COSTS.longest for begin, end in cuts)
    free = [COSTS.stage_times(*cut)[0] for cut in cuts[1:-1]
            if 1_280 < cut[1] - cut[0] < COSTS.longest - 256]
    if free:  # but for rounding to units
        assert max(free) < 1.15 * min(free)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("num_tokens", [131_072, 262_144, 524_288, 1_000_000])
def test_a_dense_plan_is_as_good_as_any_fixed_chunk(stages: int, num_tokens: int) -> None:
    costs = DenseCosts(terms=COSTS.terms, stage_shares=(1 / stages,) * stages, unit_len=128,
                       shortest=1_024, longest=32_768)

    def total_s(ends: list[int]) -> float:
        return flow([costs.stage_times(*cut) for cut in pairwise((0, *ends))],
                    max_in_flight=stages + 1).total_s

    planned_s = total_s(list(plan_dense(costs, 0, num_tokens)))
    fixed_s = {length: total_s([*range(length, num_tokens, length), num_tokens])
               for length in (1_024, 2_048, 3_072, 4_096, 8_192, 16_384, 32_768)}
    assert planned_s <= 1.003 * min(fixed_s.values())
    assert planned_s < 0.99 * fixed_s[32_768]


@pytest.mark.parametrize("terms", [(1e-3, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1e-5, 0.0),
                                   (0.0, 0.0, 1e-10), (1e-3, 0.0, 1e-300)])
@pytest.mark.parametrize("start", [0, 300])
def test_costs_that_are_nothing_have_a_plan(terms: tuple[float, ...], start: int) -> None:
    """As a latency model has them that has seen steps of one size alone."""
    fixed, token, pair = terms
    ends = plan_dense(replace(COSTS, terms=(fixed, token, pair)), start, 100_000)
    assert ends[-1] == 100_000
    assert all(0 < stop - begin <= COSTS.longest for begin, stop in pairwise((start, *ends)))
