"""Checks of prompts, before any computing. No torch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from numbers import Integral
from typing import cast

import numpy as np

from longspan.errors import InvalidRequestError, PromptTooLongError

Prompt = str | Sequence[int]
"""Text, or token ids."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list. Raises `InvalidRequestError` for anything else."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise InvalidRequestError("prompts must be text, token ids, or a list of either")
    if prompts and not isinstance(prompts[0], str | Sequence):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def as_token_ids(values: Sequence[int], vocab_size: int) -> array[int]:
    """Checked token ids. Raises `InvalidRequestError` for none, or naming the first wrong one."""
    if isinstance(values, bytes | bytearray) or not isinstance(values, Sequence | np.ndarray):
        raise InvalidRequestError(
            f"a prompt must be text or a list of token ids, not {type(values).__name__}")
    if not len(values):
        raise InvalidRequestError("the prompt is empty; give at least one token")
    if isinstance(values, array) and values.typecode == "i":
        numbers = np.frombuffer(values, dtype=np.int32)
        if numbers.min() >= 0 and numbers.max() < vocab_size:
            return values  # a tokenizer's: a million tokens in a millisecond
    for index, value in enumerate(values):
        if not _is_token_id(value, vocab_size):
            raise InvalidRequestError(
                f"token {index} of the prompt is {value!r}; token ids of this model are integers "
                f"from 0 to {vocab_size - 1}")
    return array("i", values)


def _is_token_id(value: object, vocab_size: int) -> bool:
    return (isinstance(value, Integral) and not isinstance(value, bool)
            and 0 <= int(value) < vocab_size)


def check_fits(prompt_len: int, max_tokens: int, longest_len: int) -> None:
    """Raises `PromptTooLongError` unless prompt and completion fit ``longest_len`` tokens."""
    if prompt_len + max_tokens > longest_len:
        remedy = (f"ask for at most {longest_len - prompt_len}" if prompt_len < longest_len
                  else f"shorten the prompt by at least {prompt_len + max_tokens - longest_len}")
        raise PromptTooLongError(
            f"prompt of {prompt_len} tokens plus max_tokens {max_tokens} is "
            f"{prompt_len + max_tokens}, over the limit of {longest_len} tokens; {remedy}")
