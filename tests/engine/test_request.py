"""SamplingParams refuses nonsense in one line; Request names its lengths."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest

from longspan.engine.request import SamplingParams, conclude
from longspan.errors import InvalidRequestError
from tests.doubles import make_request


@pytest.mark.parametrize(("field", "value", "wanted"), [
    ("temperature", -0.1, "between 0 (greedy) and 100"),
    ("temperature", float("nan"), "between 0 (greedy) and 100"),
    ("temperature", float("inf"), "between 0 (greedy) and 100"),
    ("temperature", "hot", "between 0 (greedy) and 100"),
    ("top_k", -1, "an integer from 0 (all tokens) to 2^31 - 1"),
    ("top_k", 1.5, "an integer from 0 (all tokens) to 2^31 - 1"),
    ("top_p", -0.1, "between 0 and 1"),
    ("top_p", 1.01, "between 0 and 1"),
    ("min_p", -0.5, "between 0 and 1"),
    ("min_p", True, "between 0 and 1"),
    ("seed", -2, "an integer from 0 to 2^63 - 1, or -1 for a fresh one"),
    ("seed", 2**63, "an integer from 0 to 2^63 - 1, or -1 for a fresh one"),
    ("max_tokens", 0, "a positive integer, or 0 with prompt_logprobs"),
    ("stop", ("",),
     "one or several strings of valid Unicode, none of them empty"),
    ("stop", (3,),
     "one or several strings of valid Unicode, none of them empty"),
    ("stop_token_ids", (-1,), "token ids"),
    ("min_tokens", -1, "an integer from 0 to max_tokens, which is 256"),
    ("min_tokens", 257, "an integer from 0 to max_tokens, which is 256"),
    ("presence_penalty", 2.5, "between -2 and 2"),
    ("presence_penalty", "a", "between -2 and 2"),
    ("frequency_penalty", -2.1, "between -2 and 2"),
    ("frequency_penalty", float("nan"), "between -2 and 2"),
    ("repetition_penalty", 0, "between 0.01 and 100; 1: none"),
    ("repetition_penalty", float("inf"), "between 0.01 and 100; 1: none"),
    ("logprobs", 21, "None or an integer from 0 to 20"),
    ("logprobs", True, "None or an integer from 0 to 20"),
])
def test_out_of_range_fields_are_refused(field: str, value: Any, wanted: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**{field: value})
    assert str(error.value) == f"{field} is {value!r}; it must be {wanted}"


@pytest.mark.parametrize(("fields", "message"), [
    ({"logit_bias": {-1: 1}}, "a key of logit_bias is -1; it must be a token id"),
    ({"logit_bias": {"7": 1}}, "a key of logit_bias is '7'; it must be a token id"),
    ({"logit_bias": {7: 101}}, "logit_bias of token 7 is 101; it must be between -100 and 100"),
    ({"logit_bias": 3}, "logit_bias must map token ids to numbers, for example {13: -100}"),
    ({"logit_bias": dict.fromkeys(range(1025), 1)},
     "logit_bias names 1025 tokens; at most 1024"),
    ({"json_schema": {"a": {1, 2}}}, "json_schema is no JSON: Object of type set is not JSON "
     "serializable"),
    ({"json_schema": "x" * 65_537}, "json_schema has 65537 characters; at most 65536"),
    ({"json_schema": "{}", "ignore_eos": True},
     "ignore_eos does not go with json_schema and grammar: these say where the end is"),
    ({"json_schema": "{}", "min_tokens": 3},
     "min_tokens does not go with json_schema and grammar: these say where the end is"),
])
def test_fields_that_go_together_badly(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**fields)
    assert str(error.value) == message


def test_mappings_are_taken_and_kept_as_plain_values() -> None:
    params = SamplingParams(
        logit_bias={3: -1, 5: 2.5}, json_schema={"type": "object"})  # type: ignore[arg-type]
    assert params.logit_bias == ((3, -1), (5, 2.5))
    assert params.json_schema == '{"type": "object"}'
    assert hash(params) == hash(replace(params))


def test_stop_takes_one_string_or_several() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert hash(SamplingParams(stop_token_ids=[1]))  # type: ignore[arg-type]


def test_lengths_and_states() -> None:
    request = make_request("a", [1, 2, 3], max_tokens=5)
    assert (request.prompt_len, request.total_len, request.reserved_len) == (3, 3, 8)
    assert request.is_prefill and not request.awaits_token
    request.scheduled_len = 3
    assert not request.is_prefill and request.awaits_token
    request.output_ids.append(9)
    assert (request.total_len, request.awaits_token) == (4, False)


@pytest.mark.parametrize(("sampled", "num_outputs", "wanted"), [
    (None, 0, (None, None)), (-1, 0, (None, "abort")), (5, 0, (5, None)), (5, 2, (5, "length")),
    (7, 0, (7, "stop")), (0, 2, (0, "stop"))])
def test_what_a_sample_means_for_its_request(
    sampled: int | None, num_outputs: int, wanted: tuple[int | None, str | None],
) -> None:
    params = SamplingParams(max_tokens=3, stop_token_ids=(7,))
    assert conclude(params, frozenset({0}), sampled, num_outputs) == wanted
    if sampled == 0:
        goes_on = replace(params, ignore_eos=True)
        assert conclude(goes_on, frozenset({0}), sampled, 1) == (0, None)


@pytest.mark.parametrize(("sampled", "wanted"), [
    (None, (None, None)), (-1, (None, "abort")), (5, (None, "length")), (0, (None, "length"))])
def test_a_prompt_that_is_only_scored_ends_without_a_token(
    sampled: int | None, wanted: tuple[None, str | None]
) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    assert conclude(params, frozenset({0}), sampled, 0) == wanted


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 3), (2, 4), (3, 5), (0, 5), (4, 4)])
def test_tokens_span_prompt_and_completion(start: int, stop: int) -> None:
    request = make_request("a", [1, 2, 3])
    request.output_ids.extend([4, 5])
    assert request.tokens(start, stop) == array("i", [1, 2, 3, 4, 5][start:stop])


def test_what_asks_for_nothing_is_nothing() -> None:
    given = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, seed=-1)  # type: ignore
    assert given == SamplingParams()


def test_a_grammar_is_one_constraint_alone() -> None:
    assert SamplingParams(grammar="start: \"a\"").constraint == "start: \"a\""
    assert SamplingParams(json_schema="{}").constraint == "{}"
    wrong: list[dict[str, Any]] = [
        {"grammar": "a: b"}, {"grammar": 5}, {"grammar": "start: a", "json_schema": "{}"},
        {"grammar": "start:" + "x" * 65_536}, {"grammar": "start: a", "min_tokens": 1}]
    for values in wrong:
        with pytest.raises(InvalidRequestError, match="grammar"):
            SamplingParams(**values)
