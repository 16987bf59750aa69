"""The sampler: extras remembered by slot, counts kept on the device, grammars on the host."""

from __future__ import annotations

import json
import weakref
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from longspan.config import EngineConfig, ModelConfig
from longspan.engine.device.memory import workspace_bytes
from longspan.engine.device.sampling import SampledTokens, Sampler, history_bytes
from longspan.engine.step import RowSampling, SamplingExtras, ScheduledSlice
from longspan.engine.text.grammar import Grammars
from longspan.engine.text.tokenizer import Tokenizer
from longspan.ops.sampling.sample import NO_TOKEN, SamplingRows
from tests.doubles import MODEL, make_request, write_tokenizer

VOCAB, END = 264, 256
GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
PROMPT = [3, 4, 5, 4]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return Tokenizer(path)


@pytest.fixture
def sampler(tokenizer: Tokenizer) -> Sampler:
    return Sampler(vocab_size=VOCAB, device="cpu", grammars=lambda: Grammars(tokenizer, VOCAB))


def first(slot: int = 0, **params: Any) -> ScheduledSlice:
    """The slice that ends the prompt."""
    request = make_request("r", PROMPT, **{"max_tokens": 50, **params})
    return make_slice(slot, 0, array("i", PROMPT), SamplingExtras.of(request))


def later(slot: int, num_outputs: int, *token: int) -> ScheduledSlice:
    """The slice after so many sampled tokens; without a token it runs ahead."""
    return make_slice(slot, len(PROMPT) + num_outputs - 1, array("i", token), None)


def make_slice(
    slot: int, cached_len: int, token_ids: array[int], extras: SamplingExtras | None,
) -> ScheduledSlice:
    return ScheduledSlice(
        request_id="r", slot=slot, token_ids=token_ids, cached_len=cached_len,
        prompt_len=len(PROMPT), block_ids=(), sparse=False, sampling=GREEDY, extras=extras)


def sample(sampler: Sampler, logits: Tensor, *items: ScheduledSlice) -> SampledTokens:
    count = len(items)
    rows = SamplingRows(
        temperature=torch.zeros(count), top_k=torch.zeros(count, dtype=torch.int64),
        top_p=torch.ones(count), min_p=torch.zeros(count),
        seed=torch.zeros(count, dtype=torch.int64), position=torch.arange(count))
    return sampler.sample(logits.clone(), items, rows, all_greedy=True)


def greedy(sampler: Sampler, logits: Tensor, *items: ScheduledSlice) -> list[int]:
    return list(sample(sampler, logits, *items).as_tuples()[0])


def test_a_prompt_is_not_kept_once_its_tokens_are_noted(sampler: Sampler) -> None:
    """The slot may stay unused for long, and a million tokens are 4 MB."""
    item = first(repetition_penalty=2.0, presence_penalty=0.5)
    assert item.extras is not None
    prompt_ids = weakref.ref(item.extras.prompt_ids)
    assert greedy(sampler, peaks(t3=2.0, t9=1.5), item) == [9]
    del item
    assert prompt_ids() is None
    assert greedy(sampler, peaks(t3=2.0, t9=1.2, t8=0.8), later(0, 1, 9)) == [3]
    assert greedy(sampler, peaks(t3=2.0, t9=1.2, t8=1.1), later(0, 2, 3)) == [8]


def peaks(**heights: float) -> Tensor:
    """One row with logits of named tokens, ``t7=3.0``, and 0 elsewhere."""
    logits = torch.zeros(1, VOCAB)
    for name, height in heights.items():
        logits[0, int(name[1:])] = height
    return logits


def test_nothing_asked_nothing_kept() -> None:
    request = make_request("r", PROMPT, temperature=1.0, stop_token_ids=(1,))
    assert SamplingExtras.of(request) is None


def test_frequency_counts_what_was_sampled_without_the_host(sampler: Sampler) -> None:
    logits = peaks(t7=3.0, t8=2.4, t9=1.9)
    tokens = greedy(sampler, logits, first(frequency_penalty=0.5))
    for index in range(1, 6):
        tokens += greedy(sampler, logits, later(0, index))
    # 7: 3.0 2.5 2.0 1.5; 8: 2.4 1.9 1.4; 9: 1.9
    assert tokens == [7, 7, 8, 7, 8, 9]


def test_presence_takes_once(sampler: Sampler) -> None:
    logits = peaks(t7=3.0, t8=2.4)
    tokens = greedy(sampler, logits, first(presence_penalty=1.0))
    for index in range(1, 5):
        tokens += greedy(sampler, logits, later(0, index))
    assert tokens == [7, 8, 7, 7, 7]


def test_the_prompt_counts_for_repetition_alone(sampler: Sampler) -> None:
    logits = peaks(t4=3.0, t8=2.0)
    assert greedy(sampler, logits, first(repetition_penalty=2.0)) == [8]
    assert greedy(sampler, logits, first(presence_penalty=2.0, frequency_penalty=2.0)) == [4]


def test_repetition_counts_the_completion(sampler: Sampler) -> None:
    logits = peaks(t7=3.0, t8=2.0)
    assert greedy(sampler, logits, first(repetition_penalty=2.0)) == [7]
    assert greedy(sampler, logits, later(0, 1)) == [8]


def test_a_new_owner_of_a_slot_starts_afresh(sampler: Sampler) -> None:
    logits = peaks(t7=3.0, t8=2.5)
    assert greedy(sampler, logits, first(presence_penalty=1.0)) == [7]
    assert greedy(sampler, logits, first(presence_penalty=1.0)) == [7]
    assert greedy(sampler, logits, later(0, 1)) == [8]
    assert greedy(sampler, logits, first()) == [7]
    assert greedy(sampler, logits, later(0, 1)) == [7]


def test_neighbours_do_not_matter(sampler: Sampler) -> None:
    logits = peaks(t7=3.0, t8=2.5).expand(4, -1)
    items = [first(5, presence_penalty=1.0), first(0), first(2, logit_bias={9: 50}),
             first(9, repetition_penalty=1.5, logprobs=0)]
    assert greedy(sampler, logits, *items) == [7, 7, 9, 7]
    assert greedy(sampler, logits, *(later(item.slot, 1) for item in reversed(items))) == \
        [8, 9, 7, 8]


def test_bias(sampler: Sampler) -> None:
    logits = peaks(t7=3.0, t8=2.5)
    assert greedy(sampler, logits, first(logit_bias={7: -1})) == [8]
    assert greedy(sampler, logits, later(0, 1)) == [8]
    assert greedy(sampler, logits, first(logit_bias={100: 100.0})) == [100]


def test_no_end_before_min_tokens(sampler: Sampler) -> None:
    logits = peaks(t0=5.0, t6=4.0, t8=1.0)  # 0 is the doubles' end of text
    item = first(min_tokens=2, stop_token_ids=(6,), logit_bias={0: 5})
    assert greedy(sampler, logits, item) == [8]
    assert greedy(sampler, logits, later(0, 1)) == [8]
    assert greedy(sampler, logits, later(0, 2)) == [0]


def test_logprobs_are_of_the_models_own_distribution(sampler: Sampler) -> None:
    logits = peaks(t7=3.0, t8=2.5).expand(3, -1)
    token_ids, logprobs = sample(
        sampler, logits, first(0, logprobs=2, logit_bias={7: -50}), first(1),
        first(2, logprobs=0)).cpu().as_tuples()
    raw = logits[0].log_softmax(0)
    assert token_ids == (8, 7, 7)
    assert logprobs[1] is None
    assert logprobs[0] is not None and logprobs[2] is not None
    assert logprobs[0].logprob == pytest.approx(float(raw[8]))
    assert logprobs[0].top_ids == (7, 8)
    assert logprobs[0].top_logprobs == pytest.approx((float(raw[7]), float(raw[8])))
    assert logprobs[2].logprob == pytest.approx(float(raw[7]))
    assert logprobs[2].top_ids == ()


def test_nobody_asked_for_logprobs(sampler: Sampler) -> None:
    assert sample(sampler, peaks(t7=1.0), first(presence_penalty=1.0)).as_tuples() == ((7,), ())


def test_a_grammar_leads_to_its_end(sampler: Sampler, tokenizer: Tokenizer) -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"enum": ["xy", "z"]}},
                         "required": ["a"], "additionalProperties": False})
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, VOCAB, generator=generator)
    tokens = greedy(sampler, logits, first(json_schema=schema))
    while tokens[-1] != END and len(tokens) < 400:
        logits = torch.randn(1, VOCAB, generator=generator)
        tokens += greedy(sampler, logits, later(0, len(tokens), tokens[-1]))
    assert tokens[-1] == END
    assert json.loads(tokenizer.decode(tokens[:-1]))["a"] in ("xy", "z")


def test_a_grammar_that_cannot_go_on_gives_no_token(sampler: Sampler) -> None:
    logits = peaks(t7=1.0).expand(2, -1)
    items = first(0, json_schema='{"type": "object"}', logprobs=1), first(1)
    greedy(sampler, logits, *items)
    token_ids, logprobs = sample(
        sampler, logits, later(0, 1, 0), later(1, 1, 7)).as_tuples()  # the first one must be {
    assert token_ids == (NO_TOKEN, 7)
    assert logprobs[0] is not None and logprobs[1] is None


# -- memory ----------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that torch held at once for this, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("num_rows", [1, 8, 20])
def test_whatever_requests_ask_for_is_in_the_memory_plan(num_rows: int) -> None:
    """All rows at once: penalties, their tables, log-probabilities, and every filter."""
    vocab_size = 50_000
    config = EngineConfig(model="m", device="cpu", dtype="float32", max_num_requests=num_rows)
    model = ModelConfig(**{**MODEL, "vocab_size": vocab_size})
    planned = (workspace_bytes(model, config, num_rows)
               - workspace_bytes(replace(model, vocab_size=1), config, num_rows))
    sampler = Sampler(vocab_size=vocab_size, device="cpu", grammars=lambda: pytest.fail())
    ask = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1,
           "logprobs": 20, "logit_bias": {3: 1.0}}
    rows = SamplingRows(
        temperature=torch.ones(num_rows), top_k=torch.full((num_rows,), 20),
        top_p=torch.full((num_rows,), 0.9), min_p=torch.full((num_rows,), 0.1),
        seed=torch.zeros(num_rows, dtype=torch.int64), position=torch.arange(num_rows))

    def work() -> None:
        for items in ([first(slot, **ask) for slot in range(num_rows)],
                      [later(slot, 1) for slot in range(num_rows)]):
            sampler.sample(torch.randn(num_rows, vocab_size), items, rows, all_greedy=False)

    small = 8192  # places, slots, parameters
    assert planned / 2 < peak_bytes(work) <= planned + small


@pytest.mark.parametrize("slots", [range(20), (19, *range(19)), (0, 17, 19), (19,)])
def test_penalty_tables_grow_no_further_than_planned(slots: Any) -> None:
    sampler = Sampler(vocab_size=VOCAB, device="cpu", grammars=lambda: pytest.fail())
    for slot in slots:
        greedy(sampler, peaks(t7=1.0), first(slot, repetition_penalty=1.1))
    tables = (sampler._history._counts, sampler._history._in_prompt, sampler._history._penalties)
    assert sum(table.nbytes for table in tables) <= history_bytes(VOCAB, 20)
