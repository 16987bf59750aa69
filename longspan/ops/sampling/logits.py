"""Changes to logits before a token is chosen, and log-probabilities. No host sync inside.

Shape legend: B rows (requests), V vocabulary, K alternatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Penalties(NamedTuple):
    """Parameters of B rows, on the device of the logits."""

    presence: Tensor
    """[B] fp32; 0: none."""
    frequency: Tensor
    """[B] fp32; 0: none."""
    repetition: Tensor
    """[B] fp32; 1: none."""


def penalize(logits: Tensor, counts: Tensor, in_prompt: Tensor, penalties: Penalties) -> Tensor:
    """Return the logits with less (or, with negative penalties, more) for tokens that were there
    before.

    Args:
        logits: [B, V] fp32.
        counts: [B, V] int32, times that the completion has each token.
        in_prompt: [B, V] bool, tokens of the prompt.

    First repetition, over prompt and completion, as in Hugging Face's processor
    (positive logits are divided, negative ones multiplied), then frequency and presence, over the
    completion alone, as in OpenAI's API. Returns [B, V].
    """
    factor = torch.where(in_prompt | (counts > 0), penalties.repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    logits = logits - penalties.frequency[:, None] * counts
    return logits - penalties.presence[:, None] * (counts > 0)


def keep_allowed(logits: Tensor, bits: Tensor) -> Tensor:
    """Return the logits of tokens whose bit is set, -inf elsewhere. NaN and infinity stay: a model
    that is broken is not to be hidden.

    Args:
        logits: [B, V] fp32.
        bits: [B, ceil(V / 32)] int32, the bit of token i is bit ``i % 32`` of word ``i // 32``.
    """
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    allowed = (bits[:, :, None] >> places & 1).bool().flatten(1)[:, : logits.shape[1]]
    return logits.masked_fill(~allowed & (logits < torch.inf), -torch.inf)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-probabilities of one token for each row, and of the most probable ones, best
    first. [B, V] fp32 and [B] int64 to [B], [B, K] ids and [B, K] values."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    top, ids = logits.topk(num_top, dim=-1)
    return (logits.gather(1, token_ids[:, None]) - total)[:, 0], ids, top - total


def top_logprobs(logits: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute natural log-probabilities. [B, V] fp32 to [B, V] of all tokens, [B, K] ids and [B, K]
    values of the ``num_top`` most probable ones, best first."""
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(num_top, dim=-1)
    return logprobs, ids, values
