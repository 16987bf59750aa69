"""Prompts are checked before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from longspan.engine.intake import as_prompts, as_token_ids
from longspan.engine.request import check_fits
from longspan.errors import InvalidRequestError, PromptTooLongError


@pytest.mark.parametrize(("prompts", "expected"), [
    ("a", ["a"]),
    (["a", "b"], ["a", "b"]),
    ([1, 2], [[1, 2]]),
    ([[1, 2], "a"], [[1, 2], "a"]),
    ([], []),
])
def test_one_prompt_or_several(prompts: Any, expected: list[Any]) -> None:
    assert as_prompts(prompts) == expected


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_arrays_of_any_library_are_lists(array: Any) -> None:
    assert as_prompts(array([1, 2])) == [[1, 2]]
    assert as_prompts(array([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert as_prompts([array([1, 2]), "x", [3]]) == [[1, 2], "x", [3]]
    assert list(as_token_ids(array([0, 4]), 5)) == [0, 4]
    for wrong in (array([[0, 4]]), array([0.0]), array(4)):
        with pytest.raises(InvalidRequestError):
            as_token_ids(wrong, 5)


def test_anything_else_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="text, token ids, or a list of either"):
        as_prompts(7)  # type: ignore[arg-type]


def test_token_ids_of_any_integer_type() -> None:
    assert list(as_token_ids([0, 4], 5)) == [0, 4]
    assert list(as_token_ids(np.array([0, 4]), 5)) == [0, 4]  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 5, 1.0, True, "1", None, 2**40])
def test_wrong_token_ids_are_named(wrong: Any) -> None:
    with pytest.raises(InvalidRequestError) as error:
        as_token_ids([1, wrong], 5)
    assert str(error.value) == (
        f"token 1 of the prompt is {wrong!r}; token ids of this model are integers from 0 to 4")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        as_token_ids([], 5)


def test_the_limit_counts_prompt_and_completion() -> None:
    check_fits(60, 4, 64)
    with pytest.raises(PromptTooLongError, match="ask for at most 4"):
        check_fits(60, 5, 64)
    with pytest.raises(PromptTooLongError, match="shorten the prompt by at least 5"):
        check_fits(64, 5, 64)
