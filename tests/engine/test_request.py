"""SamplingParams refuses nonsense in one line; Request names its lengths."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from longspan.engine.request import SamplingParams
from longspan.errors import InvalidRequestError
from tests.doubles import make_request


@pytest.mark.parametrize(("field", "value", "wanted"), [
    ("temperature", -0.1, "0 (greedy) or a positive number"),
    ("temperature", float("nan"), "0 (greedy) or a positive number"),
    ("temperature", float("inf"), "0 (greedy) or a positive number"),
    ("temperature", "hot", "0 (greedy) or a positive number"),
    ("top_k", -1, "0 (all tokens) or a positive integer"),
    ("top_k", 1.5, "0 (all tokens) or a positive integer"),
    ("top_p", 0.0, "above 0 and at most 1"),
    ("top_p", 1.01, "above 0 and at most 1"),
    ("min_p", -0.5, "between 0 and 1"),
    ("min_p", True, "between 0 and 1"),
    ("seed", -1, "an integer from 0 to 2^63 - 1"),
    ("seed", 2**63, "an integer from 0 to 2^63 - 1"),
    ("max_tokens", 0, "a positive integer"),
    ("stop", ("",), "one or several strings that are not empty"),
    ("stop", (3,), "one or several strings that are not empty"),
    ("stop_token_ids", (-1,), "token ids"),
])
def test_out_of_range_fields_are_refused(field: str, value: Any, wanted: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**{field: value})
    assert str(error.value) == f"{field} is {value!r}; it must be {wanted}"


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


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 3), (2, 4), (3, 5), (0, 5), (4, 4)])
def test_tokens_span_prompt_and_completion(start: int, stop: int) -> None:
    request = make_request("a", [1, 2, 3])
    request.output_ids.extend([4, 5])
    assert request.tokens(start, stop) == array("i", [1, 2, 3, 4, 5][start:stop])
