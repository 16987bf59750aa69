"""LLM with penalties, bias, log-probabilities and JSON schemas: against a plain loop over
transformers' logits, and on nano."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams, TokenEvent
from longspan.errors import InvalidRequestError
from tests.doubles import write_checkpoint

NextLogits = Callable[[list[int]], Tensor]

NUM_TOKENS = 24
PROMPTS = [[5, 6, 7, 8, 5, 6], list(range(40, 90)), [9] * 21]
EXTRAS: list[dict[str, Any]] = [
    {}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.8}, {"repetition_penalty": 1.4},
    {"presence_penalty": -1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2,
     "logit_bias": {5: 2.5, 9: -100}}]
PERSON: dict[str, Any] = {
    "type": "object", "required": ["name", "age", "likes"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150,
                                                             "minimum": 0},
        "likes": {"type": "array", "maxItems": 3, "items": {"enum": ["tea", "coffee", "water"]}}}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(str(path), device="cpu", dtype="float32", block_size=8, prefill_chunk_len=32,
             max_model_len=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def next_logits(path: Path) -> NextLogits:
    """Logits [V] after some tokens, by transformers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**json.loads((path / "config.json").read_text()))
    model = Qwen2ForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()

    def run(tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0, -1]

    return run


@pytest.fixture(scope="module")
def nano() -> Iterator[LLM]:
    with LLM("nano", device="cpu", max_model_len=2048) as llm:
        yield llm


def plain(
    next_logits: NextLogits, prompt: list[int], presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0, repetition_penalty: float = 1.0,
    logit_bias: dict[int, float] | None = None,
) -> list[int]:
    """Greedy, one token after the other, everything computed anew each time."""
    from transformers import RepetitionPenaltyLogitsProcessor

    repeat, output = RepetitionPenaltyLogitsProcessor(repetition_penalty), list[int]()
    for _ in range(NUM_TOKENS):
        tokens = prompt + output
        scores = repeat(torch.tensor([tokens]), next_logits(tokens)[None])[0]
        for token in set(output):
            scores[token] -= frequency_penalty * output.count(token) + presence_penalty
        for token, bias in (logit_bias or {}).items():
            scores[token] += bias
        output.append(int(scores.argmax()))
    return output


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NUM_TOKENS, "ignore_eos": True, **values})


@pytest.mark.parametrize("extras", EXTRAS, ids=lambda extras: "+".join(extras) or "plain")
def test_greedy_completions_follow_the_definition(
    llm: LLM, next_logits: NextLogits, extras: dict[str, Any],
) -> None:
    wanted = [tuple(plain(next_logits, prompt, **extras)) for prompt in PROMPTS]
    assert [output.token_ids for output in llm.generate(PROMPTS, params(**extras))] == wanted
    again = llm.generate(PROMPTS, params(**extras))  # from the prefix cache, and in other slots
    assert again[1].num_cached_tokens > 0
    assert [output.token_ids for output in again] == wanted


def test_requests_with_different_extras_do_not_mix(llm: LLM) -> None:
    alone = [llm.generate([PROMPTS[0]], params(**extras))[0].token_ids for extras in EXTRAS]
    streams = [llm.stream(PROMPTS[0], params(**extras)) for extras in EXTRAS]
    outputs: dict[int, RequestOutput] = {}
    while len(outputs) < len(streams):
        for index, stream in enumerate(streams):
            event = next(stream, None)
            if isinstance(event, TokenEvent) and event.output is not None:
                outputs[index] = event.output
    assert [outputs[index].token_ids for index in range(len(EXTRAS))] == alone
    assert len(set(alone)) > 2


def test_logprobs_are_the_models_own(llm: LLM, next_logits: NextLogits) -> None:
    for prompt in PROMPTS:
        (output,) = llm.generate([prompt], params(
            logprobs=4, temperature=1.0, seed=3, presence_penalty=2.0, logit_bias={11: 5}))
        tokens = list(prompt)
        assert len(output.logprobs) == NUM_TOKENS
        for token, found in zip(output.token_ids, output.logprobs, strict=True):
            logprobs = next_logits(tokens).log_softmax(0)
            best = logprobs.topk(4)
            assert found.token_id == token
            assert found.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
            assert [item.token_id for item in found.top] == best.indices.tolist()
            assert [item.logprob for item in found.top] == pytest.approx(
                best.values.tolist(), abs=1e-4)
            tokens.append(token)


def test_streamed_logprobs_are_those_of_the_result(llm: LLM) -> None:
    events = [event for event in llm.stream(PROMPTS[0], params(logprobs=0))
              if isinstance(event, TokenEvent)]
    assert events[-1].output is not None
    streamed = [item for event in events for item in event.logprobs]
    assert tuple(streamed) == events[-1].output.logprobs
    assert len(streamed) == NUM_TOKENS and streamed[0].top == ()


def test_nothing_asked_no_logprobs(llm: LLM) -> None:
    assert llm.generate([PROMPTS[0]], params())[0].logprobs == ()


def test_min_tokens(llm: LLM) -> None:
    first = llm.generate([PROMPTS[0]], params())[0].token_ids[0]
    ends = params(stop_token_ids=(first,))
    assert llm.generate([PROMPTS[0]], ends)[0].token_ids == (first,)
    longer = llm.generate([PROMPTS[0]], params(stop_token_ids=(first,), min_tokens=5))[0]
    assert first not in longer.token_ids[:5]


def fits(person: Any) -> bool:
    return (set(person) == {"name", "age", "likes"} and len(person["name"]) <= 20
            and 0 <= person["age"] <= 150 and isinstance(person["age"], int)
            and len(person["likes"]) <= 3 and set(person["likes"]) <= {"tea", "coffee", "water"})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_fit_their_schema(nano: LLM, temperature: float) -> None:
    prompts = [f"Person number {number}: " for number in range(3)]
    outputs = nano.generate(prompts, SamplingParams(
        max_tokens=300, temperature=temperature, seed=1,
        json_schema=PERSON))  # type: ignore[arg-type]
    whole = [output for output in outputs if output.finish_reason == "stop"]
    assert len(whole) == len(outputs)
    assert all(fits(json.loads(output.text)) for output in whole)


def test_an_answer_that_is_too_long_for_max_tokens_says_so(nano: LLM) -> None:
    (output,) = nano.generate(["A person: "], SamplingParams(
        max_tokens=5, json_schema=PERSON))  # type: ignore[arg-type]
    assert output.finish_reason == "length"
    assert output.text.startswith("{") and len(output.token_ids) == 5


def test_guided_and_free_requests_together(nano: LLM) -> None:
    free = SamplingParams(max_tokens=20, ignore_eos=True)
    (alone,) = nano.generate(["Once upon a time"], free)
    streams = [nano.stream("Once upon a time", free), nano.stream("A person: ", SamplingParams(
        max_tokens=300, temperature=0.8, seed=2, frequency_penalty=0.3,
        json_schema=PERSON))]  # type: ignore[arg-type]
    outputs = [None, None]
    while None in outputs:
        for index, stream in enumerate(streams):
            outputs[index] = getattr(next(stream, None), "output", None) or outputs[index]
    assert outputs[0].token_ids == alone.token_ids  # type: ignore[attr-defined]
    assert fits(json.loads(outputs[1].text))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("values", "message"), [
    ({"json_schema": '{"type": "thing"}'}, "json_schema cannot be followed: Invalid type: thing"),
    ({"logit_bias": {264: 1.0}}, "logit_bias names token 264; token ids of this model are integers "
                                 "from 0 to 263"),
])
def test_refused_before_anything_is_computed(
    llm: LLM, values: dict[str, Any], message: str,
) -> None:
    before = llm.stats().num_requests
    with pytest.raises(InvalidRequestError) as error:
        llm.generate(PROMPTS, SamplingParams(**values))
    assert str(error.value) == message
    assert llm.stats().num_requests == before
