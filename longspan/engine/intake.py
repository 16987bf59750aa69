"""Requests as they come in: checked prompts and the checkpoint's sampling defaults.

No torch.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import numpy as np

from longspan.config import AttentionMode, read_json
from longspan.engine.request import MAX_SEED, Request, SamplingParams, check_fits
from longspan.engine.resolve import resolve_attention
from longspan.errors import CheckpointError, InvalidRequestError

ADVISED_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of `SamplingParams` that generation_config.json has under the same name and meaning."""
Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Intake:
    """Turns token ids into requests: what one engine accepts, and how it computes it."""

    vocab_size: int
    """Token ids that the model knows; the tokenizer may know fewer."""
    max_model_len: int
    """Longest prompt plus completion, tokens."""
    attention: AttentionMode = "auto"
    sparse_threshold: int = 32_768
    """Prompts longer than this are sparse, tokens."""
    has_plan: bool = False
    """Whether the user or the checkpoint brought sparsity budgets."""
    has_dca: bool = False

    def make(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams,
        eos_token_ids: frozenset[int],
    ) -> Request:
        """Make a request that can be computed.

        Raises `InvalidRequestError` for a prompt that is empty, or an id in prompt or parameters
        that is not a token of the model, `PromptTooLongError` when it does not fit.
        """
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        self._check_tokens("logit_bias", [token for token, _ in params.logit_bias])
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.vocab_size:
                raise InvalidRequestError(f"{name} asks for {getattr(params, name)} alternatives; "
                                          f"this model has {self.vocab_size} tokens")
        token_ids = as_token_ids(prompt_ids, self.vocab_size)
        if params.prompt_logprobs_start > len(token_ids):
            raise InvalidRequestError(f"prompt_logprobs_start is {params.prompt_logprobs_start}, "
                                      f"but the prompt has {len(token_ids)} tokens")
        check_fits(len(token_ids), params.max_tokens, self.max_model_len)
        return Request(
            request_id=request_id, prompt_ids=token_ids, params=params,
            seed=secrets.randbelow(MAX_SEED) if params.seed is None else params.seed,
            eos_token_ids=eos_token_ids,
            sparse=resolve_attention(
                self.attention, len(token_ids), has_plan=self.has_plan,
                threshold=self.sparse_threshold, has_dca=self.has_dca))

    def _check_tokens(self, name: str, tokens: Sequence[int]) -> None:
        for token in tokens:
            if token >= self.vocab_size:
                raise InvalidRequestError(
                    f"{name} names token {token}; token ids of this model are integers from 0 to "
                    f"{self.vocab_size - 1}")


def default_sampling(path: Path) -> dict[str, float]:
    """Read the sampling fields that the checkpoint recommends (generation_config.json).

    Raises `CheckpointError` when they cannot be used.
    """
    file = path / "generation_config.json"
    raw = read_json(file) if file.is_file() else {}
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: not a JSON object; fetch the file again")
    is_greedy = raw.get("do_sample") is False  # without sampling its other fields mean nothing
    names = ("repetition_penalty",) if is_greedy else ADVISED_FIELDS
    values = {name: raw[name] for name in names if raw.get(name) is not None}
    if is_greedy:
        values["temperature"] = 0.0
    try:
        SamplingParams(**values)
    except InvalidRequestError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return values


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt or several as a list. Raises `InvalidRequestError` for anything else.

    Arrays of numpy, torch and others count as lists: [T] is one prompt, [N, T] are several.
    """
    prompts = _as_list(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise InvalidRequestError("prompts must be text, token ids, or a list of either")
    if prompts and not isinstance(_as_list(prompts[0]), str | Sequence):
        return [cast(Sequence[int], prompts)]
    return [_as_list(prompt) for prompt in prompts]


def _as_list(value: Any) -> Any:
    """Turn an array of any library into lists of Python's numbers."""
    is_array = hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0
    return value.tolist() if is_array and not isinstance(value, Sequence) else value


def as_token_ids(values: Sequence[int], vocab_size: int) -> array[int]:
    """Check token ids. Raises `InvalidRequestError` for none; names the first wrong one."""
    values = _as_list(values)
    if isinstance(values, bytes | bytearray) or not isinstance(values, Sequence):
        raise InvalidRequestError(
            f"a prompt must be text or a list of token ids, not {type(values).__name__}")
    if not len(values):
        raise InvalidRequestError("the prompt is empty; give at least one token")
    if isinstance(values, array) and values.typecode == "i":
        numbers = np.frombuffer(values, dtype=np.int32)
        if numbers.min() >= 0 and numbers.max() < vocab_size:
            return values  # made by a tokenizer: a million tokens in a millisecond
    for index, value in enumerate(values):
        if not _is_token_id(value, vocab_size):
            raise InvalidRequestError(
                f"token {index} of the prompt is {value!r}; token ids of this model are integers "
                f"from 0 to {vocab_size - 1}")
    return array("i", values)


def _is_token_id(value: object, vocab_size: int) -> bool:
    return (isinstance(value, Integral) and not isinstance(value, bool)
            and 0 <= int(value) < vocab_size)
