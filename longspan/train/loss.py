"""Weighted cross-entropy through the head in chunks: the logits never exist as a whole.

At 262,144 tokens and a vocabulary of 4,096 the fp32 logits alone would take 4.3 GB, and three
such tensors live at once in the ordinary computation; with 151,936 words it is 159 GB each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 16_384
"""Tokens of a chunk, at most."""
CHUNK_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 24}
"""Logits of a chunk, at most, by device: 1 GiB in fp32 on GPUs, of which about five live at once;
on CPUs what caches hold counts."""
MIN_CHUNK = 128


def chunk_len(vocab_size: int, device: str = "cuda") -> int:
    """Tokens of a chunk."""
    logits = CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"])
    return max(MIN_CHUNK, min(CHUNK, logits // vocab_size // MIN_CHUNK * MIN_CHUNK))


def _chunk_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (nll [C] fp32, hit [C], dlogits [C, V]) of logits [C, V], targets, weights [C]."""
    scores = logits.float()
    lse = scores.logsumexp(-1, keepdim=True)
    nll = (lse - scores.gather(-1, targets[:, None])).squeeze(-1)
    hit = scores.argmax(-1) == targets
    columns = torch.arange(scores.shape[-1], device=scores.device)
    one_hot = (columns == targets[:, None]).float()
    grad = ((scores - lse).exp() - one_hot) * weights[:, None]
    return nll, hit, grad.to(logits.dtype)


ChunkLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def compiled_chunk_loss(is_compiled: bool) -> ChunkLoss:
    """Return what computes a chunk, compiled or not."""
    return torch.compile(_chunk_loss, dynamic=False) if is_compiled else _chunk_loss


class _WeightedCrossEntropy(torch.autograd.Function):
    """Computes the gradients chunk by chunk during the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor,
        chunk_loss: ChunkLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        low, step = head.to(hidden.dtype), chunk_len(len(head), head.device.type)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        nlls, hits = [], []
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            logits = hidden[part] @ low.T
            nll, hit, grad = chunk_loss(logits, targets[part], weights[part])
            grad_hidden[part] = grad @ low
            grad_head += grad.T @ hidden[part]
            nlls.append(nll)
            hits.append(hit)
        nll, hit = torch.cat(nlls), torch.cat(hits)
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        ctx.mark_non_differentiable(nll, hit)
        return (nll * weights).sum(), nll, hit

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grads[0] * grad_hidden, grads[0] * grad_head, None, None, None


def weighted_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor,
    chunk_loss: ChunkLoss = _chunk_loss,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of weight x nll, and per token nll and whether argmax hits.

    hidden [T, M] (bf16 or fp32), head [V, M] (fp32), targets [T] int64, weights [T] fp32, of any
    sign -> loss [] (differentiable in hidden and head), nll [T] fp32, hit [T] bool.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        result = _WeightedCrossEntropy.apply(hidden, head, targets, weights, chunk_loss)
    loss, nll, hit = result
    return loss, nll, hit


@torch.no_grad()
def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nll and whether argmax hits, per token, without gradients: both [T], as above."""
    low, step = head.to(hidden.dtype), chunk_len(len(head), head.device.type)
    nlls, hits = [], []
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        scores = (hidden[part] @ low.T).float()
        nlls.append(scores.logsumexp(-1) - scores.gather(-1, targets[part, None]).squeeze(-1))
        hits.append(scores.argmax(-1) == targets[part])
    return torch.cat(nlls), torch.cat(hits)
