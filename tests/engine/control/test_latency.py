"""The latency model: recovers what it is shown, stays sensible when shown little or nonsense."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import reduce

import pytest

from longspan.engine.control.chunking import chunk_pieces
from longspan.engine.control.latency import (
    Costs,
    Forecast,
    LatencyModel,
    Work,
    add_terms,
    dense_terms,
    piece_terms,
    sparse_terms,
)

TRUE = Costs(dense=(8e-3, 2.4e-4, 4.5e-8), sparse=(8e-3, 5e-4, 1e-9, 8e-6),
             decode=(9e-3, 1e-3, 2e-6))


def random_work(rng: random.Random) -> Work:
    kind = rng.choice(["dense", "sparse", "decode", "mixed"])
    history, tokens = rng.randrange(0, 131_072), rng.randrange(128, 4096)
    decode = (1.0, float(rng.randrange(1, 8)), float(rng.randrange(10, 40_000)))
    if kind == "dense":
        return Work(dense=dense_terms(history, tokens))
    if kind == "sparse":
        pieces = chunk_pieces(history, history + 16_384, num_layers=6, rows=4_096)
        first, chunk = rng.randrange(len(pieces)), sparse_terms(history, 16_384)
        last = rng.randrange(first, len(pieces))
        some = (piece_terms(chunk, piece) for piece in pieces[first : last + 1])
        return Work(sparse=reduce(add_terms, some))
    if kind == "decode":
        return Work(decode=decode)
    return Work(dense=dense_terms(history, tokens), decode=decode)


def test_terms_are_those_of_the_formulas() -> None:
    assert TRUE.dense_s(100, 10) == pytest.approx(8e-3 + 2.4e-3 + 4.5e-8 * 10 * 210)
    assert TRUE.sparse_s(100, 10) == pytest.approx(8e-3 + 5e-3 + 1e-9 * 100 * 10 + 8e-6 * 110)
    assert TRUE.decode_s(3, 1000) == pytest.approx(9e-3 + 3e-3 + 2e-3)
    both = Work(dense=dense_terms(100, 10), decode=(1.0, 3.0, 1000.0))
    assert both.seconds(TRUE) == pytest.approx(TRUE.dense_s(100, 10) + TRUE.decode_s(3, 1000))


@pytest.mark.parametrize("seed", range(3))
def test_recovers_the_machine_from_noisy_steps(seed: int) -> None:
    rng = random.Random(seed)
    model = LatencyModel()
    for _ in range(400):
        work = random_work(rng)
        model.observe(work, work.seconds(TRUE) * rng.uniform(0.9, 1.1))
    for _ in range(50):
        work = random_work(rng)
        assert work.seconds(model.costs) == pytest.approx(work.seconds(TRUE), rel=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_several_lengths_tell_the_selection_from_the_rows(seed: int) -> None:
    """A GPU's selection costs more than the prior thinks: a pipeline's ladder shows it."""
    rng = random.Random(seed)
    true = Costs(sparse=(2e-3, 2.2e-5, 2e-12, 1.1e-7))
    model = LatencyModel(Costs(sparse=(2e-3, 1.5e-4, 3e-11, 2.5e-7)))
    cuts = [(start, 8_192) for start in range(0, 65_536, 8_192)]
    cuts += [(start, 16_384) for start in range(65_536, 262_144, 16_384)]
    cuts += [(start, 32_768) for start in range(262_144, 983_040, 32_768)]
    for start, length in cuts:
        model.observe(Work(sparse=sparse_terms(start, length)),
                      true.sparse_s(start, length) * rng.uniform(0.98, 1.02))
    for start, length in ((131_072, 8_192), (524_288, 16_384), (900_000, 32_768)):
        assert model.costs.sparse_s(start, length) == pytest.approx(
            true.sparse_s(start, length), rel=0.1)


def test_one_kind_teaches_the_speed_of_the_others() -> None:
    model = LatencyModel(TRUE)
    for tokens in (128, 512, 4096):
        work = Work(dense=dense_terms(0, tokens))
        model.observe(work, 10 * work.seconds(TRUE))
    assert model.costs.sparse_s(65_536, 16_384) == pytest.approx(
        10 * TRUE.sparse_s(65_536, 16_384), rel=0.01)


def test_decode_is_no_measure_for_prefill() -> None:
    """It waits for memory, and on a busy machine for other processes, a hundred times longer."""
    slow = Work(decode=(1.0, 1.0, 100.0))
    only_decode, both = LatencyModel(TRUE), LatencyModel(TRUE)
    work = Work(dense=dense_terms(0, 1024))
    both.observe(work, 2 * work.seconds(TRUE))
    for model in (only_decode, both):
        for _ in range(20):
            model.observe(slow, 100 * slow.seconds(TRUE))
    assert only_decode.costs.sparse == TRUE.sparse and only_decode.costs.dense == TRUE.dense
    assert both.costs.sparse_s(65_536, 16_384) == pytest.approx(
        2 * TRUE.sparse_s(65_536, 16_384), rel=0.01)
    assert slow.seconds(both.costs) == pytest.approx(100 * slow.seconds(TRUE), rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_what_every_step_costs_on_a_busy_machine_is_no_measure_for_the_work(seed: int) -> None:
    """Two steps of a server's first prompts, each a second and a half late: unmeasured chunks are
    late by as much, and not a hundred times longer."""
    rng = random.Random(seed)
    model = LatencyModel(TRUE)
    for tokens in (512, 1024):
        model.observe(Work(dense=dense_terms(0, tokens)),
                      1.5 * rng.uniform(0.9, 1.1) + TRUE.dense_s(0, tokens))
    forecast = Forecast(costs=model.costs, block_size=128, prefill_chunk_len=16_384,
                        sparse_above=32_768, tail_len=1024)
    true_s = replace(forecast, costs=TRUE).prefill_s(0, 131_072) + 9 * 1.5
    assert true_s / 2 < forecast.prefill_s(0, 131_072) < 6 * true_s  # 90 times before


@pytest.mark.parametrize("factor", [5, 20, 100])
def test_a_slow_first_step_is_forgotten_at_once(factor: int) -> None:
    model = LatencyModel(TRUE)
    first = Work(dense=dense_terms(0, 512))
    model.observe(first, factor * first.seconds(TRUE))
    for number, tokens in enumerate((1024, 512, 700, 300)):
        work = Work(dense=dense_terms(0, tokens))
        model.observe(work, work.seconds(TRUE))
        true_s = TRUE.dense_s(0, 800)
        assert model.costs.dense_s(0, 800) < (1.8 if number == 0 else 1.5) * true_s


@pytest.mark.parametrize("seed", range(20))
def test_short_steps_say_nothing_absurd_about_long_ones(seed: int) -> None:
    """Hundreds of short prompts, alike and noisy, after a long one that is forgotten by then: their
    noise must not pass for what attention costs."""
    rng = random.Random(seed)
    model = LatencyModel(TRUE)
    for start in range(0, 131_072, 8192):
        work = Work(dense=dense_terms(start, 128))
        model.observe(work, 0.5 * work.seconds(TRUE) * rng.uniform(0.8, 1.2))
    for _ in range(300):
        work = Work(dense=dense_terms(0, rng.randrange(100, 108)))
        model.observe(work, 0.5 * work.seconds(TRUE) * rng.uniform(0.7, 1.6))
    far = Work(dense=dense_terms(131_072, 1024))
    assert far.seconds(model.costs) == pytest.approx(0.5 * far.seconds(TRUE), rel=0.6)


def test_two_pieces_that_contradict_each_other() -> None:
    """As measured once: the first piece of a chunk takes longer than one of twice its size. It does
    not follow that pieces take no time."""
    model = LatencyModel(TRUE)
    for tokens, seconds in ((432.0, 0.243), (960.0, 0.182)):
        model.observe(Work(sparse=(1.0, tokens, 0.0, 0.0)), seconds)
    assert Work(sparse=(1.0, 15_000.0, 0.0, 0.0)).seconds(model.costs) > 2.0


def test_a_stray_time_counts_for_little() -> None:
    model = LatencyModel(TRUE)
    work = Work(dense=dense_terms(1000, 1000))
    for _ in range(10):
        model.observe(work, work.seconds(TRUE))
    model.observe(work, 100 * work.seconds(TRUE))
    assert work.seconds(model.costs) < 2.2 * work.seconds(TRUE)


def test_a_slower_machine_is_believed_after_a_few_steps() -> None:
    model = LatencyModel(TRUE)
    work = Work(dense=dense_terms(1000, 1000))
    for factor, count in ((1, 30), (5, 6)):
        for _ in range(count):
            model.observe(work, factor * work.seconds(TRUE))
    assert work.seconds(model.costs) == pytest.approx(5 * work.seconds(TRUE), rel=0.15)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_nonsense_is_ignored(seconds: float) -> None:
    model = LatencyModel()
    model.observe(Work(dense=dense_terms(0, 10)), seconds)
    model.observe(Work(), 1.0)
    assert model.num_observations == 0 and model.costs == Costs()


def test_coefficients_are_never_negative() -> None:
    rng = random.Random(1)
    model = LatencyModel()
    for _ in range(200):
        model.observe(random_work(rng), rng.uniform(1e-3, 1.0))
        costs = model.costs
        assert min(*costs.dense, *costs.sparse, *costs.decode) >= 0


def test_a_forecast_adds_up_chunk_by_chunk() -> None:
    forecast = Forecast(costs=TRUE, block_size=100, prefill_chunk_len=1000, sparse_above=5000,
                        tail_len=500)
    dense = sum(TRUE.dense_s(start, min(1000, 4300 - start)) for start in range(0, 4300, 1000))
    assert forecast.prefill_s(0, 4300) == pytest.approx(dense)
    sparse = sum(TRUE.sparse_s(start, min(1000, 7500 - start)) for start in range(0, 7500, 1000))
    tail = TRUE.sparse_s(7500, 700)  # 7700 is rounded down, and no chunk ends at 8000
    assert forecast.prefill_s(0, 8200) == pytest.approx(sparse + tail)
    assert forecast.prefill_s(7500, 8200) == pytest.approx(tail)
    assert forecast.prefill_s(10, 10) == 0
