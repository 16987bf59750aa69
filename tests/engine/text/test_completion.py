"""A request as its caller sees it: text, progress, timings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longspan.engine.request import Progress, RequestOutput, TokenEvent
from longspan.engine.step import RowLogprobs, StepReport, Update
from longspan.engine.text.completion import Completion
from longspan.engine.text.tokenizer import Tokenizer
from tests.doubles import make_request, write_tokenizer

REPORT = StepReport(submitted_s=10.0, finished_s=12.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return Tokenizer(path)


def make_completion(tokenizer: Tokenizer, **params: Any) -> Completion:
    return Completion(make_request("a", [1, 2, 3, 4], **params), tokenizer)


def push_text(completion: Completion, tokenizer: Tokenizer, text: str) -> list[bool]:
    return [completion.push(update(4 + index, token), REPORT)
            for index, token in enumerate(tokenizer.encode(text))]


def update(computed_len: int, token_id: int | None, reason: Any = None) -> Update:
    return Update(request_id="a", computed_len=computed_len, num_cached_tokens=1,
                  token_id=token_id, finish_reason=reason)


def result(completion: Completion) -> RequestOutput:
    assert completion.output is not None
    return completion.output


def test_progress_before_and_after_every_chunk(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer)
    completion.push(update(2, None), REPORT)
    completion.push(update(4, tokenizer.encode("x")[0]), REPORT)
    completion.push(update(5, tokenizer.encode("y")[0]), REPORT)
    kinds = [event.num_prefilled_tokens if isinstance(event, Progress) else event.text
             for event in completion.events]
    assert kinds == [0, 2, 4, "x", "y"]


@pytest.mark.parametrize(("cached", "seen"), [(2, [(0, 0), (2, 2), (4, 1)]), (0, [(0, 0), (4, 1)])])
def test_admission_tells_what_the_cache_supplied_once(
    tokenizer: Tokenizer, cached: int, seen: list[tuple[int, int]],
) -> None:
    completion = make_completion(tokenizer)
    completion.admit(cached)
    completion.admit(3)
    completion.push(update(4, None), REPORT)
    assert [(event.num_prefilled_tokens, event.num_cached_tokens) for event in completion.events
            if isinstance(event, Progress)] == seen


def test_times_rates_and_density(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer)
    pairs = [(0.0, 0.0), (1.0, 4.0), (9.0, 9.0)]
    tokens = [None, 20, 21]
    for index, (token, (kept, causal)) in enumerate(zip(tokens, pairs, strict=True)):
        completion.push(update(2 * index + 2, token, "length" if index == 2 else None), StepReport(
            submitted_s=10.0 + index, finished_s=10.5 + index, kept_pairs=kept,
            causal_pairs=causal))
    output = result(completion)
    assert (output.prefill_s, output.decode_tokens_per_s, output.density) == (1.5, 1.0, 0.25)
    assert output.ttft_s is not None
    assert (output.num_prompt_tokens, output.num_cached_tokens) == (4, 1)


def test_a_stop_string_ends_the_request_from_outside(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer, stop=("lo",))
    assert push_text(completion, tokenizer, "hello") == [False, False, False, False, True]
    assert (result(completion).text, result(completion).finish_reason) == ("hel", "stop")
    last = completion.events[-1]
    assert isinstance(last, TokenEvent) and last.output is completion.output
    assert completion.push(update(9, 3), REPORT) is False  # a step that was already in flight
    assert result(completion).token_ids == tuple(tokenizer.encode("hello"))


def test_a_stop_string_in_the_last_token_needs_no_abort(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer, stop=("h",))
    assert completion.push(update(4, tokenizer.encode("h")[0], "length"), REPORT) is False
    assert (result(completion).text, result(completion).finish_reason) == ("", "stop")


def test_held_back_text_comes_at_the_end(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer, stop=("xyz",))
    push_text(completion, tokenizer, "ax")
    completion.push(update(6, tokenizer.encode("y")[0], "length"), REPORT)
    assert result(completion).text == "axy"


def push_logprobs(
    completion: Completion, tokenizer: Tokenizer, text: str, reason: Any = None,
) -> None:
    """One token after the other, with its place as log-probability."""
    tokens = tokenizer.encode(text)
    for index, token in enumerate(tokens):
        last = reason if index == len(tokens) - 1 else None
        completion.push(Update(
            request_id="a", computed_len=4 + index, num_cached_tokens=0, token_id=token,
            finish_reason=last, logprobs=RowLogprobs(-float(index), (token,), (-0.5,))), REPORT)


def pieces(completion: Completion) -> list[tuple[str, list[str]]]:
    return [(event.text, [item.text for item in event.logprobs]) for event in completion.events
            if isinstance(event, TokenEvent)]


def test_logprobs_come_with_their_text(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer, stop=("lo!",))
    push_logprobs(completion, tokenizer, "hellos", "length")
    assert pieces(completion) == [
        ("h", ["h"]), ("e", ["e"]), ("", []), ("l", ["l"]), ("", []), ("los", ["l", "o", "s"])]
    assert [item.logprob for item in result(completion).logprobs] == [0, -1, -2, -3, -4, -5]
    assert result(completion).logprobs[0].top[0].data == b"h"


def test_tokens_of_a_stop_string_have_no_logprobs(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer, stop=("llo",))
    push_logprobs(completion, tokenizer, "hello")
    assert [item.text for item in result(completion).logprobs] == ["h", "e"]


def test_the_token_that_stops_has_no_logprobs(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer)
    push_logprobs(completion, tokenizer, "ab", "stop")
    assert result(completion).text == "a"
    assert [item.text for item in result(completion).logprobs] == ["a"]


def test_parts_of_a_character_have_logprobs_of_their_own(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer, stop=("x",))
    push_logprobs(completion, tokenizer, "é!", "length")
    assert pieces(completion) == [("", ["\ufffd"]), ("é", ["\ufffd"]), ("!", ["!"])]
    assert b"".join(item.data for item in result(completion).logprobs).decode() == "é!"


def test_the_token_that_stops_is_no_text(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer)
    push_text(completion, tokenizer, "a")
    completion.push(update(5, tokenizer.encode("!")[0], "stop"), REPORT)
    assert (result(completion).text, len(result(completion).token_ids)) == ("a", 2)


def test_an_abort_without_a_token(tokenizer: Tokenizer) -> None:
    completion = make_completion(tokenizer)
    completion.push(update(0, None, "abort"), StepReport())
    output = result(completion)
    assert (output.finish_reason, output.text, output.ttft_s) == ("abort", "", None)
    assert (output.prefill_s, output.decode_tokens_per_s, output.density) == (None, None, None)
