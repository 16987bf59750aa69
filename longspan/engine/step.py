"""What travels between scheduler and runner: one step's work and its result. No torch.

Plain data, sent between processes as lists of fields. Structs, because a step of many decodes is
short, and some hundred of these are made for it: one costs a quarter of a frozen dataclass.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.request import FinishReason, Request, TokenIds
from longspan.engine.transfer import Transfer, TransferResult

NOT_FINITE = (
    "the model's logits are not finite numbers (NaN or infinity): its checkpoint is damaged, or "
    "the dtype in use is too narrow for it")


class Data(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of messages: immutable and without cycles, so the garbage collector can skip them."""


class RowSampling(Data, frozen=True, kw_only=True):
    """How the token after one slice is chosen."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


class SamplingExtras(Data, frozen=True, kw_only=True):
    """Sampling options that only some requests use. The runner is told once, with the slice that
    samples first, and remembers it, and counts the tokens that follow, until another request
    samples first in the same slot.

    Rows with a ``constraint`` are never run ahead: the grammar is told each token by the host."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    prompt_ids: TokenIds = msgspec.field(default_factory=lambda: array("i"))
    """The whole prompt for a repetition penalty, cached tokens included; empty otherwise."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    """Tokens that the completion must have before any of ``end_ids`` may come."""
    end_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """Log-probabilities of the token and of this many most probable ones; None: none at all."""
    constraint: str | None = None

    @classmethod
    def of(cls, request: Request) -> SamplingExtras | None:
        """Return a request's extras; None: it has none."""
        params = request.params
        ends = params.stop_token_ids
        if not params.ignore_eos:
            ends += tuple(sorted(request.eos_token_ids))
        extras = cls(
            presence_penalty=params.presence_penalty, frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty, logit_bias=params.logit_bias,
            prompt_ids=request.prompt_ids if params.repetition_penalty != 1 else array("i"),
            min_tokens=params.min_tokens, end_ids=ends if params.min_tokens else (),
            logprobs=params.logprobs, constraint=params.constraint)
        return None if extras == cls() else extras


class RowLogprobs(Data, frozen=True):
    """Log-probabilities of one sampled token, before penalties, temperature and filters."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    """The most probable tokens, best first."""
    top_logprobs: tuple[float, ...] = ()


class ScoredTokens(Data, frozen=True, kw_only=True):
    """Prompt tokens whose log-probabilities a slice gives: each by the row before it."""

    first: int
    """Place of the first one in the prompt; the row before it is in the slice."""
    token_ids: TokenIds
    """[n], one more than the slice's own where the prompt goes on behind it."""
    num_top: int
    """Alternatives for each."""


class PromptLogprobs(Data, frozen=True, kw_only=True):
    """Log-probabilities of consecutive prompt tokens, as bytes: there may be a million."""

    request_id: str
    first: int
    """Place of the first one in the prompt."""
    logprobs: bytes
    """[n] fp32"""
    top_ids: bytes
    """[n, K] int32, the most probable tokens, best first."""
    top_logprobs: bytes
    """[n, K] fp32"""


class SparseRecall(Data, frozen=True, kw_only=True):
    """Share of attention mass that the selections of one request's sparse queries kept, as sums
    over chunks and layers, to be added up and divided by the weights."""

    request_id: str
    typical: float
    """Sum over rows spread over each chunk."""
    typical_weight: int
    scouts: float
    """Sum over the rows least like the mean query."""
    scouts_weight: int
    """0: the plan has no scouts."""
    num_tokens: int
    """Queries that the sums cover."""


class Pieces(Data, frozen=True):
    """Part of a sparse prefill chunk's work; `longspan.engine.control.chunking` says what a piece
    is."""

    first: int
    """First piece; 0: the chunk begins, else the runner goes on where it was paused."""
    stop: int
    total: int
    """Pieces of the chunk; where ``stop`` equals it, the chunk is complete."""

    @property
    def is_last(self) -> bool:
        """Whether the chunk is complete afterwards."""
        return self.stop == self.total


class ScheduledSlice(Data, frozen=True, kw_only=True):
    """Consecutive tokens of one request that a step computes."""

    request_id: str
    token_ids: TokenIds
    """[query_len]; empty: the one token that this request's latest slice samples, which the host
    does not know yet."""
    cached_len: int
    prompt_len: int
    block_ids: Sequence[int]
    """KV blocks that cover ``context_len`` tokens, in order."""
    sparse: bool
    sampling: RowSampling | None
    """None: a prefill chunk that is not the prompt's last; no token is sampled."""
    extras: SamplingExtras | None = None
    """Sent with the slice that ends the prompt, where the request asks for any."""
    slot: int = 0
    """The request's place among those running, from 0 to max_num_requests - 1, for what the runner
    keeps of it (the token sampled last). The next owner's first step comes after the last one of
    this request."""
    scored: ScoredTokens | None = None
    """Where the request asks for log-probabilities of these prompt tokens."""
    origin: PrefixOrigin | None = None
    """Where the tokens before the first slice came from, if not all of them were on the device."""
    pieces: Pieces | None = None
    """Part of a sparse prefill chunk, which is computed apart from all other slices and paused
    after any piece. At most one chunk is paused at a time; one that begins replaces it. None:
    the whole slice, packed with the others."""

    @property
    def is_run_ahead(self) -> bool:
        """Whether the input token is still on the device."""
        return not self.token_ids

    @property
    def query_len(self) -> int:
        """Tokens computed."""
        return len(self.token_ids) or 1

    @property
    def context_len(self) -> int:
        """Tokens that the last of them may attend to."""
        return self.cached_len + self.query_len

    @property
    def done_len(self) -> int:
        """Tokens in the KV cache afterwards; a paused prefill chunk counts in proportion."""
        if self.pieces is None:
            return self.cached_len + (len(self.token_ids) or 1)
        return self.cached_len + self.query_len * self.pieces.stop // self.pieces.total


class ScheduledBatch(Data, frozen=True, kw_only=True):
    """One step: prefill slices first, then decodes of one token each."""

    step_id: int
    """0, 1, 2, ... in the order of submission, whatever the epoch."""
    slices: tuple[ScheduledSlice, ...]
    epoch: int = 0
    """Counts the times that everything in flight was given up (`Scheduler.drop_in_flight`)."""
    expected_s: float = 0.0
    """Predicted time on the runner, seconds: what a watchdog may compare with."""
    repeats: int = 1
    """Number of steps in this batch (multi-step scheduling), each a token further. Only decodes
    without `SamplingExtras` have several: their steps are shorter than the way to the runner."""
    transfers: tuple[Transfer, ...] = ()
    """Copies of blocks to begin now. The slices neither need nor write any of their blocks."""
    seen: tuple[int, ...] = ()
    """Transfers whose results are not to be reported any more."""

    @property
    def prefills(self) -> bool:
        """Whether some slice computes prompt tokens."""
        return bool(self.slices) and self.slices[0].cached_len < self.slices[0].prompt_len

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return self.repeats * sum(item.query_len for item in self.slices)

    def each(self) -> Iterator[ScheduledBatch]:
        """Return the steps in the burst, one by one."""
        yield self if self.repeats == 1 else replace(self, repeats=1)
        for index in range(1, self.repeats):
            yield replace(self, repeats=1, slices=tuple([
                replace(item, token_ids=array("i"), cached_len=item.cached_len + index)
                for item in self.slices]))


class StepResult(Data, frozen=True, kw_only=True, tag=True):
    """What a step sampled, in the order of its slices that sample."""

    step_id: int
    epoch: int = 0
    """Epoch of the batch; the result of an earlier epoch is thrown away."""
    token_ids: tuple[int, ...]
    """Sampled tokens, with repeats one step after another. Negative: there is none, and the
    request must be given up; `failure` says why."""
    logprobs: tuple[RowLogprobs | None, ...] = ()
    """For each of ``token_ids``, None where not asked for; empty when nobody asked."""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    """Scores of the slices that have `ScoredTokens`, some for each."""
    recalls: tuple[SparseRecall, ...] = ()
    """Recall in the sparse prefill chunks that the step completed."""
    failures: dict[int, str] = {}
    """Why sampling failed, by place in ``token_ids``, where the host knows it."""
    repeats: int = 1
    """Number of steps, as in the batch."""
    kept_pairs: float = 0.0
    """Attention pairs that prefill computed, over all layers and heads."""
    causal_pairs: float = 0.0
    """Pairs that dense causal attention would have computed."""
    elapsed_s: float = 0.0
    """Time that the step took on the runner, waiting for earlier steps not counted; 0: not
    measured. The latency model learns from it."""

    transfers: tuple[TransferResult, ...] = ()
    """All transfers that have ended, until the scheduler has seen it."""

    def failure(self, place: int) -> str:
        """Return why there is no token at a place of ``token_ids``."""
        return self.failures.get(place, NOT_FINITE)


class Update(Data, frozen=True, kw_only=True):
    """What one step changed for one request."""

    request_id: str
    computed_len: int
    """Tokens in the KV cache now; a paused prefill chunk counts in proportion."""
    num_cached_tokens: int
    """Number of these tokens that came from the prefix cache."""
    token_id: int | None
    """The token sampled; None after a prefill chunk that is not the last, an abort, or a prompt
    without completion."""
    finish_reason: FinishReason | None = None
    logprobs: RowLogprobs | None = None
    """Log-probabilities of ``token_id``, where asked for."""
    origin: PrefixOrigin | None = None
    """Where the cached tokens came from, if not all of them were on the device."""
    failure: str = ""
    """Why the engine aborted the request; empty: it did not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one turn of the loop changed. Times are of ``time.monotonic``."""

    updates: tuple[Update, ...] = ()
    submitted_s: float = 0.0
    """Time at which the step was handed to the runner."""
    finished_s: float = 0.0
    kept_pairs: float = 0.0
    causal_pairs: float = 0.0
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    recalls: tuple[SparseRecall, ...] = ()
