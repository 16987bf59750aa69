"""The latency model: recovers what it is shown, stays sensible when shown little or nonsense."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.serve.latency import PRIOR, LatencyModel, prefill_s

TRUE = (4e-3, 2e-8, 3e-5, 2e-11)


def chunk_s(history: int, chunk: int, coefficients=TRUE) -> float:
    c, gamma, b, a = coefficients
    return c + gamma * history + b * chunk + a * (2 * history * chunk + chunk * chunk)


def test_it_learns_within_a_few_long_prompts():
    rng, model = random.Random(0), LatencyModel()
    for _ in range(4):
        for history in range(0, 1 << 20, 32768):
            model.observe(history, 32768, chunk_s(history, 32768) * rng.uniform(0.97, 1.03))
        model.observe(0, 4000, chunk_s(0, 4000))
    for length in (131_072, 524_288, 1 << 20):
        true = prefill_s(TRUE, 0, length, 32768)
        assert model.prefill_s(0, length, 32768) == pytest.approx(true, rel=0.03)


def test_it_follows_a_change():
    model = LatencyModel()
    for factor, count in ((1.0, 100), (1.6, 100), (9.0, 10), (1.0, 10)):
        for _ in range(count):
            model.observe(0, 4096, factor * chunk_s(0, 4096))
        assert model.chunk_s(0, 4096) == pytest.approx(factor * chunk_s(0, 4096), rel=0.06)


@pytest.mark.parametrize("factor", [0.01, 1.0, 300.0])
def test_one_short_prompt_sets_the_speed(factor):
    model = LatencyModel()
    long_s = model.prefill_s(0, 1 << 20, 8192)
    model.observe(0, 8192, factor * model.chunk_s(0, 8192))
    assert model.prefill_s(0, 1 << 20, 8192) == pytest.approx(factor * long_s)


def test_a_slow_machine_where_attention_is_all():
    """Seven chunks of one prompt on a busy laptop."""
    times = (1.8, 2.55, 3.15, 3.9, 5.2, 6.2, 6.5)
    model = LatencyModel()
    for index, seconds in enumerate(times):
        model.observe(2048 * index, 2048, seconds)
    assert model.prefill_s(0, 7 * 2048, 2048) == pytest.approx(sum(times), rel=0.1)
    assert 400 < model.prefill_s(0, 1 << 16, 2048) < 700  # the same line, continued


def test_a_slow_first_chunk_does_little_harm():
    model = LatencyModel()
    model.observe(0, 8192, 30 * chunk_s(0, 8192))
    for _ in range(5):
        model.observe(0, 8192, chunk_s(0, 8192))
    assert model.chunk_s(0, 8192) < 1.2 * chunk_s(0, 8192)


@pytest.mark.parametrize("stray", [1e-5, 1e-2, 30.0])
def test_it_recovers_from_a_wrong_start(stray):
    model = LatencyModel()
    for _ in range(3):
        model.observe(0, 8192, stray)
    for _ in range(10):
        model.observe(0, 8192, 1.0)
    assert model.chunk_s(0, 8192) == pytest.approx(1.0, rel=0.1)


def test_nonsense_is_ignored():
    model = LatencyModel()
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        model.observe(0, 100, seconds)
    model.observe(0, 0, 1.0)
    model.observe(-1, 5, 1.0)
    assert model.coefficients == PRIOR and model.num_observations == 0


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 17),
                          st.floats(1e-6, 1e5)), max_size=30))
def test_predictions_are_never_negative_and_grow(observations):
    model = LatencyModel()
    for history, chunk, seconds in observations:
        model.observe(history, chunk, seconds)
    assert all(value >= 0 for value in model.coefficients)
    times = [model.prefill_s(0, length, 8192) for length in (0, 1, 10_000, 1 << 20)]
    assert times == sorted(times) and times[0] == 0 and times[-1] < float("inf")


@given(st.integers(0, 50), st.integers(1, 400), st.integers(1, 64))
def test_the_closed_form_is_the_sum_over_chunks(start, count, chunk):
    stop, total, place = start + count, 0.0, start
    while place < stop:
        size = min(chunk, stop - place)
        total += chunk_s(place, size)
        place += size
    assert prefill_s(TRUE, start, stop, chunk) == pytest.approx(total)


def test_it_is_cheap():
    model = LatencyModel()
    start_s = time.process_time()
    for index in range(200):
        model.observe(index * 100, 4096, chunk_s(index * 100, 4096))
    assert time.process_time() - start_s < 0.5
