"""What travels between scheduler and runner: one step's work and its result. No torch.

Plain data, so that a later transport may send it between processes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(item.query_len for item in self.slices)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step sampled, in the order of its slices that sample."""

    step_id: int
    token_ids: tuple[int, ...]
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
