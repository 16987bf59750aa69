"""Causal attention for training, without any mask.

A mask would take 69 GB at 262,144 tokens, leave the fast kernels, and be silently wrong above
65,536 tokens in some of them (pytorch#162588). Rows that are padded at their end need none.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from longspan.train.world import ContextGroup

ATTENTION_NAME = "longspan_causal"
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
log = logging.getLogger(__name__)


def causal_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, scaling: float | None = None,
    context: ContextGroup | None = None, **_: object,
) -> tuple[Tensor, None]:
    """Attend from query [B, H, Q, D] to key, value [B, K, S, D]: ([B, Q, H, D], None); no mask.

    With Q < S the queries are the last Q positions (a question after a cached document). With a
    ``context`` of several processes all three are this process's places of the rows.
    """
    if attention_mask is not None:
        raise ValueError("longspan_causal takes no attention mask: use one document per row")
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.shape[2] != key.shape[2]:
        return _suffix_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None
    if context is not None and context.size > 1:
        return _shared_attention(query, key, value, scaling, context).transpose(1, 2), None
    key, value = _repeated(query, key, value)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of every query head."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _shared_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, context: ContextGroup
) -> Tensor:
    """Attend from this process's two pieces of rows to all that is before them: [B, H, Q, D]."""
    keys, values = _repeated(query, context.gather(key), context.gather(value))
    outs = []
    for piece, part in zip(context.pieces(), query.chunk(2, 2), strict=True):
        stop = (piece + 1) * part.shape[2]
        outs.append(F.scaled_dot_product_attention(
            part, keys[:, :, :stop], values[:, :, :stop], scale=scale,
            attn_mask=causal_lower_right(part.shape[2], stop)))
    return torch.cat(outs, 2)


def _suffix_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attend from the last Q positions to all S keys, explicitly in fp32: [B, H, Q, D]."""
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * q_len, dim).float()
    scores = grouped @ key.float().transpose(-1, -2) * (scale or dim**-0.5)
    positions = torch.arange(k_len, device=key.device)
    last = positions[k_len - q_len :].repeat(heads // kv_heads)
    scores = scores.masked_fill(positions[None, :] > last[:, None], float("-inf"))
    out = scores.softmax(-1) @ value.float()
    return out.reshape(batch, heads, q_len, dim).to(value.dtype)


AttentionInterface.register(ATTENTION_NAME, causal_attention)


def choose_backend(shape: tuple[int, int], num_heads: int, head_dim: int) -> list[SDPBackend]:
    """Choose the faster of cuDNN and flash SDPA, forward and backward, at rows x length."""
    timings: list[tuple[float, SDPBackend]] = []
    for backend in BACKENDS:
        try:
            timings.append((_time_attention(backend, shape, num_heads, head_dim), backend))
        except RuntimeError as error:
            log.warning("%s unusable: %s", backend, str(error)[:200])
    timings.sort(key=lambda pair: pair[0])
    log.info("attention at %s: %s", shape, [(str(b), round(t, 2)) for t, b in timings])
    return [b for _, b in timings] or [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _time_attention(
    backend: SDPBackend, shape: tuple[int, int], num_heads: int, head_dim: int
) -> float:
    rows, length = shape
    size = (rows, num_heads, length, head_dim)
    q, k, v = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with sdpa_kernel(backend):
        for measured in (False, True):
            if measured:
                begin.record()
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.backward(torch.ones_like(out))
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def use_backends(backends: list[SDPBackend]) -> None:
    """Enable exactly these SDPA backends for the process (read when a graph is traced)."""
    torch.backends.cuda.enable_cudnn_sdp(SDPBackend.CUDNN_ATTENTION in backends)
    torch.backends.cuda.enable_flash_sdp(SDPBackend.FLASH_ATTENTION in backends)
    torch.backends.cuda.enable_mem_efficient_sdp(SDPBackend.EFFICIENT_ATTENTION in backends)
    torch.backends.cuda.enable_math_sdp(SDPBackend.MATH in backends)
