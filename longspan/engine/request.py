"""A request from arrival to finish, and what its caller sees of it. No torch.

Lengths are named once, as properties of `Request`; nobody else does arithmetic on them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.engine.plain import (
    as_grammar,
    as_json,
    as_pairs,
    as_plain,
    as_plain_tuple,
    is_integer,
    is_number,
    is_text,
    require,
)
from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.recall import Recall
from longspan.errors import InvalidRequestError, PromptTooLongError

if TYPE_CHECKING:
    TokenIds = array[int]
    BlockIds = array[int]
else:  # until Python 3.12 array takes no parameter, and `wire` evaluates annotations
    TokenIds = BlockIds = array
FinishReason = Literal["stop", "length", "abort"]
MAX_SEED = 2**63 - 1
RANDOM_SEED = -1  # a fresh one, as in other engines
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**31 - 1
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_LOGPROBS = 20
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
MAX_NUM_BIASES = 1024
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "min_tokens",
           "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs",
           "prompt_logprobs", "prompt_logprobs_start")
"""Fields of `SamplingParams`."""


def _given(values: object) -> object:
    """Return the values, none for None. Arrays have no truth."""
    return () if values is None else values


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How completion tokens are chosen and when they end.

    Raises:
        InvalidRequestError: a field is out of range; the message names the field and the range.
    """

    temperature: float = 0.0
    """Divides the logits; 0: greedy, the most probable token."""
    top_k: int = 0
    """Keep only the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1: all, 0: one."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the most probable one; 0: all."""
    seed: int | None = None
    """Same seed, same prompt, same answer, whatever else runs; None or -1: a fresh one."""
    max_tokens: int = 256
    """Longest completion, tokens. 0: none, with ``prompt_logprobs`` alone."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; they are not part of its text."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion, besides the checkpoint's end-of-text tokens."""
    ignore_eos: bool = False
    """Go on past the checkpoint's end-of-text tokens (for benchmarks)."""
    min_tokens: int = 0
    """Shortest completion, tokens: no end-of-text and no stop token before."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the completion already has."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the completion already has it."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or completion, and multiplies negative ones."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit) pairs; a mapping becomes that."""
    logprobs: int | None = None
    """Log-probabilities of each token and of this many most probable ones; None: none at all.
    They are the model's own: before penalties, temperature and filters."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt, given those before it. None: none at all."""
    prompt_logprobs_start: int = 0
    """Prompt tokens before this place have none; only they may come from the prefix cache."""
    json_schema: str | None = None
    """JSON text of a JSON schema that the completion must fit; a dict becomes that."""
    grammar: str | None = None
    """Or a grammar, in llguidance's dialect of Lark, rule ``start`` first, one rule a line."""

    def __post_init__(self) -> None:
        for name in NUMBERS:
            object.__setattr__(self, name, as_plain(getattr(self, name)))
        if self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", None)
        stop = (self.stop,) if isinstance(self.stop, str) else _given(self.stop)
        object.__setattr__(self, "stop", as_plain_tuple("stop", stop))
        object.__setattr__(
            self, "stop_token_ids", as_plain_tuple("stop_token_ids", _given(self.stop_token_ids)))
        object.__setattr__(self, "logit_bias", as_pairs(self.logit_bias or ()))
        object.__setattr__(self, "json_schema", as_json(self.json_schema))
        object.__setattr__(self, "grammar", as_grammar(self.grammar, self.json_schema))
        self._check_choice()
        self._check_end()
        self._check_penalties()

    @property
    def constraint(self) -> str | None:
        """What the completion must fit, as `longspan.engine.text.grammar` takes it."""
        return self.grammar if self.json_schema is None else self.json_schema

    def _check_choice(self) -> None:
        require(is_number(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE,
                 "temperature", self.temperature, f"between 0 (greedy) and {MAX_TEMPERATURE:g}")
        require(is_integer(self.top_k) and 0 <= self.top_k <= MAX_TOP_K,
                 "top_k", self.top_k, "an integer from 0 (all tokens) to 2^31 - 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value <= 1, name, value, "between 0 and 1")
        require(self.seed is None or is_integer(self.seed) and 0 <= self.seed <= MAX_SEED,
                 "seed", self.seed, "an integer from 0 to 2^63 - 1, or -1 for a fresh one")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(value is None or is_integer(value) and 0 <= value <= MAX_LOGPROBS,
                     name, value, f"None or an integer from 0 to {MAX_LOGPROBS}")
        start, is_scored = self.prompt_logprobs_start, self.prompt_logprobs is not None
        require(is_integer(start) and (start == 0 or start > 0 and is_scored),
                 "prompt_logprobs_start", start, "0, or with prompt_logprobs a place in the prompt")

    def _check_end(self) -> None:
        require(is_integer(self.max_tokens)
                 and self.max_tokens >= (self.prompt_logprobs is None),
                 "max_tokens", self.max_tokens, "a positive integer, or 0 with prompt_logprobs")
        require(all(map(is_text, self.stop)),
                 "stop", self.stop, "one or several strings of valid Unicode, none of them empty")
        require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        require(all(is_integer(token) and token >= 0 for token in self.stop_token_ids),
                 "stop_token_ids", self.stop_token_ids, "token ids")
        require(is_integer(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens,
                 "min_tokens", self.min_tokens,
                 f"an integer from 0 to max_tokens, which is {self.max_tokens}")
        for name in ("ignore_eos", "min_tokens"):
            if self.constraint is not None and getattr(self, name):
                raise InvalidRequestError(f"{name} does not go with json_schema and grammar: these "
                                          "say where the end is")

    def _check_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(is_number(value) and abs(value) <= MAX_PENALTY,
                     name, value, f"between -{MAX_PENALTY:g} and {MAX_PENALTY:g}")
        least, most, value = MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY, self.repetition_penalty
        require(is_number(value) and least <= value <= most,
                 "repetition_penalty", value, f"between {least:g} and {most:g}; 1: none")
        if len(self.logit_bias) > MAX_NUM_BIASES:
            raise InvalidRequestError(
                f"logit_bias names {len(self.logit_bias)} tokens; at most {MAX_NUM_BIASES}")
        for token, bias in self.logit_bias:
            require(is_integer(token) and token >= 0, "a key of logit_bias", token, "a token id")
            require(is_number(bias) and abs(bias) <= MAX_LOGIT_BIAS,
                     f"logit_bias of token {token}", bias,
                     f"between -{MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g}")


@dataclass(kw_only=True, slots=True)
class Request:
    """One request inside the engine. The scheduler owns and changes it; nobody else does.

    Life: waiting (no blocks) -> prefill (``scheduled_len < prompt_len``) -> decode -> finished.
    ``scheduled_len`` runs ahead of ``computed_len`` while steps are in flight.
    """

    request_id: str
    prompt_ids: TokenIds
    """[prompt_len] token ids, type code "i"."""
    params: SamplingParams
    seed: int = 0
    """The seed in effect (``params.seed`` or a fresh one)."""
    eos_token_ids: frozenset[int] = frozenset()
    """The checkpoint's end-of-text tokens."""
    sparse: bool = False
    """Prefill with sparse attention."""
    output_ids: TokenIds = field(default_factory=lambda: array("i"))
    block_ids: BlockIds = field(default_factory=lambda: array("i"))
    """KV blocks in order, for all of ``reserved_len``; empty until admitted."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chain hash of each full block of tokens, as far as known."""
    num_registered: int = 0
    """Leading blocks that the prefix cache knows."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at admission."""
    scheduled_len: int = 0
    """Tokens whose keys and values are computed or being computed."""
    computed_len: int = 0
    """Tokens whose keys and values are in the cache."""
    num_in_flight: int = 0
    """Steps submitted and not yet collected that hold a slice of this request."""
    num_pieces: int = 0
    """Pieces scheduled of the sparse prefill chunk that is paused; 0: none is."""
    awaited_hash: bytes = b""
    """Hash of the last block of a prefix that this request waits for while another computes it."""
    slot: int = 0
    """Place among the running requests, while it is one."""
    num_overtaken: int = 0
    """Later requests admitted while this one waited for blocks."""
    has_extras: bool = False
    """Its sampling needs `SamplingExtras`."""
    num_transfers: int = 0
    """Copies of blocks that must end before anything more is computed."""
    loading_len: int = 0
    """Tokens that will be in the cache when these copies have ended."""
    noted_len: int = 0
    """Leading tokens whose blocks were queued for the disk, or are there."""
    origin: PrefixOrigin | None = None
    """Where the cached tokens came from, if not all of them were on the device."""
    finish_reason: FinishReason | None = None

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def total_len(self) -> int:
        """Tokens of the prompt and of the completion so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def reserved_len(self) -> int:
        """Tokens that the request can ever need room for."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def is_prefill(self) -> bool:
        """Whether prompt tokens are left to schedule."""
        return self.scheduled_len < len(self.prompt_ids)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be computed for it."""
        return self.finish_reason is not None

    @property
    def awaits_token(self) -> bool:
        """Whether a step in flight is still sampling the next token to compute."""
        return self.scheduled_len >= self.total_len

    @property
    def can_decode(self) -> bool:
        """The next token can be computed: its input is known, or will be known to the runner, and
        what is in flight does not fill the completion."""
        prompt_len, params = len(self.prompt_ids), self.params
        if not prompt_len <= self.scheduled_len < prompt_len + params.max_tokens - 1:
            return False
        return params.constraint is None or not self.awaits_token

    @property
    def num_unscheduled(self) -> int:
        """Decode steps that may still follow those in flight."""
        return len(self.prompt_ids) + self.params.max_tokens - 1 - self.scheduled_len

    def tokens(self, start: int, stop: int) -> array[int]:
        """Token ids ``start`` to ``stop - 1`` of prompt and completion together."""
        prompt_len = len(self.prompt_ids)
        if stop <= prompt_len:
            return self.prompt_ids[start:stop]
        if start >= prompt_len:
            return self.output_ids[start - prompt_len : stop - prompt_len]
        return self.prompt_ids[start:] + self.output_ids[:stop - prompt_len]


def check_fits(prompt_len: int, max_tokens: int, longest_len: int) -> None:
    """Raise `PromptTooLongError` unless prompt and completion fit ``longest_len`` tokens."""
    if prompt_len + max_tokens > longest_len:
        raise PromptTooLongError(prompt_len, max_tokens, longest_len)


def conclude(
    params: SamplingParams, eos_token_ids: frozenset[int], sampled: int | None, num_outputs: int,
) -> tuple[int | None, FinishReason | None]:
    """Decide what a step's sample means for its request. The scheduler and the front end both do,
    each from the same results. Stop strings are not seen here: they need text.

    Args:
        sampled: None: the step sampled nothing for this request. Negative: sampling failed.
        num_outputs: tokens of the completion before.

    Returns the token to append, None for none, and why the completion ends, None if it goes on.
    """
    if sampled is None:
        return None, None
    if sampled < 0:
        return None, "abort"
    if params.max_tokens == 0:
        return None, "length"  # the prompt alone was wanted
    if sampled in params.stop_token_ids or sampled in eos_token_ids and not params.ignore_eos:
        return sampled, "stop"
    return sampled, "length" if num_outputs + 1 >= params.max_tokens else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far the prefill of one request is; the first one comes before any computing."""

    request_id: str
    num_prefilled_tokens: int
    """Prompt tokens in the KV cache, cached ones included."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Number of prefilled tokens that the prefix cache already held."""
    elapsed_s: float
    """Seconds since the request arrived."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Log-probability of one token, natural logarithm, by the model's own distribution: before
    penalties, bias, grammar, temperature and filters."""

    token_id: int
    text: str
    """The token alone, U+FFFD for incomplete characters."""
    data: bytes
    """The token's bytes."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The ``params.logprobs`` most probable tokens at this place, best first."""


class PromptLogprobs(NamedTuple):
    """Log-probabilities of T prompt tokens, as `TokenLogprob` has them, with K alternatives.

    NaN, and -1 in place of token ids: the first token, and those before
    ``params.prompt_logprobs_start``."""

    logprobs: NDArray[np.float32]
    """[T]"""
    top_ids: NDArray[np.int32]
    """[T, K], best first."""
    top_logprobs: NDArray[np.float32]
    """[T, K]"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A finished request. Times are wall clock."""

    request_id: str
    text: str
    """The completion, without stop strings."""
    token_ids: tuple[int, ...]
    """Every sampled token, one that stopped the completion included."""
    finish_reason: FinishReason
    """``stop``: a stop string or token; ``length``: max_tokens; ``abort``: cancelled."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that the prefix cache supplied."""
    ttft_s: float | None
    """Arrival to first token, waiting included."""
    prefill_s: float | None
    """Start of the first prefill chunk to first token."""
    decode_tokens_per_s: float | None
    """Rate after the first token; None for completions of one token."""
    density: float | None
    """Attention pairs computed over causal pairs, in the steps that prefilled this prompt;
    1 is dense, None when nothing was measured."""
    recall: Recall | None = None
    """How much attention mass sparse prefill kept; None: no token of this prompt was prefilled
    sparsely."""
    prefix_origin: PrefixOrigin | None = None
    """Where the cached tokens came from, if not all of them were on the device."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """For each token of the text, if ``params.logprobs`` is not None; with
    ``params.prompt_logprobs`` also for a token that ended the completion."""
    prompt_logprobs: NDArray[np.float32] | None = field(default=None, compare=False)
    """[T] of the prompt's tokens, if ``params.prompt_logprobs`` is not None; NaN where there is
    none, as for the first token."""
    prompt_alternatives: PromptLogprobs | None = field(default=None, compare=False)
    """The same with the most probable tokens at each place, if any were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """New completion text of a streaming request."""

    request_id: str
    text: str
    """Text that became certain; may be empty while a character or a stop string is open."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int
    output: RequestOutput | None = None
    """The whole result, on the last event only."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """For the tokens of ``text``, if ``params.logprobs`` is not None. Held back together with
    their text; without those that ended the completion."""
    prompt_logprobs: PromptLogprobs | None = field(default=None, compare=False)
    """On the first event, if ``params.prompt_logprobs`` is not None."""


Event = Progress | TokenEvent
"""What a streaming request gives."""
