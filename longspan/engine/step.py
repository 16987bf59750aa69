"""What travels between scheduler and runner: one step's work and its result. No torch.

Plain data, so that a later transport may send it between processes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from longspan.engine.request import FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSampling:
    """How the token after one slice is chosen."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingExtras:
    """What only some requests ask of their sampling. The runner is told once, with the slice that
    samples first, and remembers it (and counts the tokens that follow) until the request is in
    `ScheduledBatch.released`."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    prompt_ids: array[int] = field(default_factory=lambda: array("i"))
    """The whole prompt for a repetition penalty, cached tokens included; empty otherwise."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    """No token of ``end_ids`` before the completion has this many."""
    end_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """Log-probabilities of the token and of this many most probable ones; None: none at all."""
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Of one sampled token: natural logarithms, before penalties, temperature and filters."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    """The most probable tokens, best first."""
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledSlice:
    """Consecutive tokens of one request that a step computes."""

    request_id: str
    token_ids: array[int]
    """[query_len]"""
    cached_len: int
    prompt_len: int
    block_ids: Sequence[int]
    """KV blocks that cover ``context_len`` tokens, in order."""
    sparse: bool
    sampling: RowSampling | None
    """None: a prefill chunk that is not the prompt's last; no token is sampled."""
    extras: SamplingExtras | None = None
    """With the slice that ends the prompt, where the request asks for any."""
    needs_host_token: bool = False
    """The host must know the token sampled after this slice before the next one is scheduled: a
    grammar follows it there."""

    @property
    def query_len(self) -> int:
        """Tokens computed."""
        return len(self.token_ids)

    @property
    def context_len(self) -> int:
        """Tokens that the last of them may attend to."""
        return self.cached_len + len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledBatch:
    """One step: prefill slices first, then decodes of one token each."""

    step_id: int
    """0, 1, 2, ... in the order of submission."""
    slices: tuple[ScheduledSlice, ...]
    released: tuple[str, ...] = ()
    """Requests of which no slice comes any more, and none is in flight."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(item.query_len for item in self.slices)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step sampled, in the order of its slices that sample."""

    step_id: int
    token_ids: tuple[int, ...]
    """-1: the request's grammar cannot go on; it must be aborted."""
    logprobs: tuple[RowLogprobs | None, ...] = ()
    """For each of ``token_ids``, None where not asked for; empty when nobody asked."""
    kept_pairs: float = 0.0
    """Attention pairs that prefill computed, over all layers and heads."""
    causal_pairs: float = 0.0
    """Pairs that dense causal attention would have computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one step changed for one request."""

    request_id: str
    computed_len: int
    """Tokens in the KV cache now."""
    num_cached_tokens: int
    """Of those, tokens that came from the prefix cache."""
    token_id: int | None
    """The token sampled; None after a prefill chunk that is not the last, or an abort."""
    finish_reason: FinishReason | None = None
    logprobs: RowLogprobs | None = None
    """Of ``token_id``, where asked for."""
