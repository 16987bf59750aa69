"""Sampling: distributions against their definition, and independence of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.ops.sampling.sample import NO_TOKEN, SamplingRows, sample, uniform

NUM_DRAWS = 20_000


def make_rows(num_rows: int, **values: Any) -> SamplingRows:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7}
    tensors = {name: torch.full((num_rows,), values.get(name, default))
               for name, default in defaults.items()}
    return SamplingRows(position=values.get("position", torch.arange(num_rows)), **tensors)


def draw(logits: Tensor, **values: Any) -> Tensor:
    """Frequencies of each token over many positions, [V]."""
    batch = logits.expand(NUM_DRAWS, -1)
    tokens = sample(batch, make_rows(NUM_DRAWS, **values), all_greedy=False)
    return tokens.bincount(minlength=logits.shape[0]) / NUM_DRAWS


def wanted(logits: Tensor, temperature: float, keep: list[int]) -> Tensor:
    probs = torch.zeros_like(logits)
    probs[keep] = (logits[keep] / temperature).softmax(0)
    return probs


LOGITS = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.0])
# softmax at temperature 1: .086 .636 .012 .234 .032


@pytest.mark.parametrize(("values", "keep"), [
    ({}, [0, 1, 2, 3, 4]),
    ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
    ({"top_k": 2}, [1, 3]),
    ({"top_k": 9}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.6}, [1]),
    ({"top_p": 0.65}, [1, 3]),
    ({"top_p": 0.9}, [0, 1, 3]),
    ({"min_p": 0.1}, [0, 1, 3]),
    ({"min_p": 1.0}, [1]),
    ({"top_k": 3, "top_p": 0.9}, [1, 3]),
    ({"temperature": 0.01}, [1]),
    ({"temperature": 1e-30}, [1]),
])
def test_frequencies_follow_the_definition(values: dict[str, float], keep: list[int]) -> None:
    probs = wanted(LOGITS, max(values.get("temperature", 1.0), 0.01), keep)
    frequencies = draw(LOGITS, **values)
    assert frequencies[probs == 0].sum() == 0
    deviation = (probs * (1 - probs) / NUM_DRAWS).sqrt()  # of a binomial frequency
    assert ((frequencies - probs).abs() <= 5 * deviation + 1e-6).all()


def test_greedy_rows_take_the_best_token_in_any_batch() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    rows = make_rows(6)._replace(temperature=torch.tensor([0.0, 1, 0, 1, 0, 1]))
    mixed = sample(logits, rows, all_greedy=False)
    assert torch.equal(mixed[::2], logits.argmax(-1)[::2])
    assert torch.equal(sample(logits, make_rows(6, temperature=0.0), all_greedy=True),
                       logits.argmax(-1))


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 1000, generator=generator)
    rows = SamplingRows(
        temperature=torch.rand(8, generator=generator) + 0.5,
        top_k=torch.tensor([0, 5, 0, 50, 0, 3, 1, 0]), top_p=torch.rand(8, generator=generator),
        min_p=torch.rand(8, generator=generator) / 10,
        seed=torch.randint(2**62, (8,), generator=generator), position=torch.arange(8))
    together = sample(logits, rows, all_greedy=False)
    for index in range(8):
        alone = SamplingRows(*(value[index:index + 1] for value in rows))
        assert sample(logits[index:index + 1], alone, all_greedy=False)[0] == together[index]


@pytest.mark.parametrize("all_greedy", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 499, 999])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_have_no_token(
    device: str, number: float, place: int, temperature: float, all_greedy: bool,
) -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(3)).to(device)
    rows = SamplingRows(*(part.to(device) for part in make_rows(5, temperature=temperature)))
    clean = sample(logits, rows, all_greedy=all_greedy)
    logits[1, place] = number
    logits[3] = -torch.inf  # no token may come
    logits[4, 1:] = -torch.inf
    tokens = sample(logits, rows, all_greedy=all_greedy)
    assert tokens.tolist() == [int(clean[0]), NO_TOKEN, int(clean[2]), NO_TOKEN, 0]


def test_seed_and_position_change_the_draw_and_repeat_it() -> None:
    logits = torch.zeros(64, 1000)
    first = sample(logits, make_rows(64), all_greedy=False)
    assert torch.equal(first, sample(logits, make_rows(64), all_greedy=False))
    assert (first == sample(logits, make_rows(64, seed=8), all_greedy=False)).sum() <= 2
    assert first.unique().numel() > 50


def test_uniform_is_uniform_over_seeds_and_positions() -> None:
    many, zero = torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64)
    for numbers in (uniform(many, zero), uniform(zero, many), uniform(many - 50_000, many)):
        assert numbers.min() >= 0 and numbers.max() < 1
        counts = numbers.mul(10).long().bincount(minlength=10)
        assert (counts - 10_000).abs().max() < 500  # five standard deviations
        correlation = torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]
        assert correlation.abs() < 0.02
