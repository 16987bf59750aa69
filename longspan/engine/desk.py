"""What everybody who takes requests has in common: prompts in, updates out. No torch.

`longspan.engine.llm.LLM` does both beside the loop; `longspan.engine.client.AsyncEngine` does them
on the caller's side and knows the engine by its messages only.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longspan.config import AttentionMode, read_json
from longspan.engine.loop import StepReport
from longspan.engine.prompts import as_token_ids, check_fits
from longspan.engine.request import (
    MAX_SEED,
    FinishReason,
    Request,
    SamplingParams,
    finish_reason,
)
from longspan.engine.resolve import resolve_attention
from longspan.engine.session import Session
from longspan.engine.step import RowLogprobs, Update
from longspan.engine.tokenizer import Tokenizer
from longspan.errors import CheckpointError, InvalidRequestError

ADVISED_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of `SamplingParams` that generation_config.json has under the same name and meaning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Intake:
    """Turns token ids into requests: what one engine accepts, and how it computes it."""

    vocab_size: int
    """Of the model; the tokenizer may know fewer."""
    max_model_len: int
    """Longest prompt plus completion, tokens."""
    attention: AttentionMode = "auto"
    sparse_threshold: int = 32_768
    """Prompts longer than this are sparse, tokens."""
    has_plan: bool = False
    """The user or the checkpoint brought sparsity budgets."""
    has_dca: bool = False

    def make(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams,
        eos_token_ids: frozenset[int],
    ) -> Request:
        """A request that can be computed.

        Raises `InvalidRequestError` for a prompt that is empty, and where prompt or parameters name
        what is no token of the model, `PromptTooLongError` when it does not fit.
        """
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        self._check_tokens("logit_bias", [token for token, _ in params.logit_bias])
        if (params.logprobs or 0) > self.vocab_size:
            raise InvalidRequestError(f"logprobs asks for {params.logprobs} alternatives; this "
                                      f"model has {self.vocab_size} tokens")
        token_ids = as_token_ids(prompt_ids, self.vocab_size)
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


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The checkpoint's tokenizer. Raises `CheckpointError` when it does not match the model."""
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer knows {tokenizer.vocab_size} tokens, the model only "
            f"{vocab_size}; fetch matching files")
    last = max(tokenizer.eos_token_ids, default=0)
    if last >= vocab_size:
        raise CheckpointError(
            f"{path}: eos_token_id is {last}, and the model has {vocab_size} tokens; correct "
            "config.json or generation_config.json")
    return tokenizer


def default_sampling(path: Path) -> dict[str, float]:
    """Sampling fields that the checkpoint recommends (generation_config.json).

    Raises `CheckpointError` when they cannot be used.
    """
    file = path / "generation_config.json"
    raw = read_json(file) if file.is_file() else {}
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: not a JSON object; fetch the file again")
    is_greedy = raw.get("do_sample") is False  # what else is said of sampling is void then
    names = ("repetition_penalty",) if is_greedy else ADVISED_FIELDS
    values = {name: raw[name] for name in names if raw.get(name) is not None}
    if is_greedy:
        values["temperature"] = 0.0
    try:
        SamplingParams(**values)
    except InvalidRequestError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return values


class Tracker:
    """Follows one request by the runner's results alone, to the scheduler's conclusions: the
    caller's side need not wait for them. What a step in flight computes past the end never gets
    here, for nobody follows a finished request."""

    def __init__(self, request: Request) -> None:
        self._request_id, self._params = request.request_id, request.params
        self._eos_token_ids = request.eos_token_ids
        self._num_cached_tokens: int | None = None
        self._num_outputs = 0

    def update(
        self, cached_len: int, computed_len: int, token: int | None, logprobs: RowLogprobs | None,
        failure: str,
    ) -> Update:
        """What a step changed that computed tokens ``cached_len`` to ``computed_len - 1``.

        Args:
            token: the one sampled; None: none was. Negative: none could be.
            failure: why none could be.
        """
        if self._num_cached_tokens is None:  # the first step begins where the cache ends
            self._num_cached_tokens = cached_len
        reason: FinishReason | None = None
        if token is not None and token < 0:
            return Update(
                request_id=self._request_id, computed_len=computed_len, token_id=None,
                num_cached_tokens=self._num_cached_tokens, finish_reason="abort", failure=failure)
        if token is not None:
            self._num_outputs += 1
            reason = finish_reason(self._params, self._eos_token_ids, token, self._num_outputs)
        return Update(
            request_id=self._request_id, computed_len=computed_len, token_id=token,
            num_cached_tokens=self._num_cached_tokens, finish_reason=reason, logprobs=logprobs)


def deliver(
    sessions: MutableMapping[str, Session], update: Update, report: StepReport,
    abort: Callable[[str], None],
) -> Session | None:
    """Hand an update to its session, which leaves ``sessions`` when it is finished. An exception
    of one request's text is its own: it ends up in the session.

    Args:
        abort: called with the id of a request that its text has ended (a stop string, a fault).

    Returns the session; None for one that nobody waits for any more.
    """
    session = sessions.get(update.request_id)
    if session is None:
        return None
    try:
        must_stop = session.push(update, report)
    except Exception as error:
        session.error, must_stop = error, True
    if must_stop:
        abort(update.request_id)
    if session.is_finished:
        sessions.pop(update.request_id, None)
    return session
