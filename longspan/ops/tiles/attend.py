"""PyTorch's own fused attention with its LSE, and what the eager fast paths feed it.

The attention functions take ``[B, H, T, D]`` tensors in any strides (the last axis contiguous), B
being requests, heads or query tiles as the caller likes, and return out [B, H, T, D] and lse
[B, H, T], ready for `merge`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.ops import int8_kv
from longspan.ops.geometry import query_position
from longspan.ops.reference import rotate
from longspan.ops.types import PagedKV, QueryRotary

Partial = tuple[Tensor, Tensor]
_aten = torch.ops.aten
_SCORE_BYTES = 1 << 29  # score rows materialised at once where no fused kernel takes a bias


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> Partial:
    """Compute softmax(scale q k^T) v. With ``causal`` T equals S and row i sees keys 0..i.

    q: [B, H, T, D]; k, v: [B, H, S, D].
    """
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=None, scale=scale)
        return out, lse
    if q.dtype == torch.float32:
        return _attend_math(q, k, v, scale, _causal_bias(q) if causal else None)
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def attend_biased(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Partial:
    """Attend as `attend` does, with a bias added to the scaled scores.

    k, v: B may be 1, then all of q's batch shares them. bias: fp32, broadcastable to [B, 1, T, S];
    -inf drops a key. A row whose keys are all dropped gives out 0 and lse -inf.
    """
    if q.device.type == "cpu":
        k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias.to(q.dtype), scale=scale)
        empty = (bias == -math.inf).all(-1)
        return out, lse.masked_fill(empty.expand(lse.shape), -math.inf)
    rows = max(1, _SCORE_BYTES // (4 * q.shape[1] * q.shape[2] * k.shape[2]))
    parts = [_attend_math(_rows(q, i, rows), _rows(k, i, rows), _rows(v, i, rows), scale,
                          _rows(bias, i, rows))
             for i in range(0, q.shape[0], rows)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def scores_fp32(q: Tensor, k: Tensor) -> Tensor:
    """Compute q k^T, accumulated and returned in fp32. q: [n, T, D]; k: [n, S, D] or [1, S, D]."""
    if k.shape[0] == 1 < q.shape[0]:  # one product instead of a batch that repeats k
        return scores_fp32(q.flatten(0, 1)[None], k)[0].unflatten(0, q.shape[:2])
    if q.device.type == "cuda" and q.dtype != torch.float32:
        return torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(q.float(), k.transpose(1, 2).float())


def merge(parts: list[Partial]) -> Partial:
    """Combine the attention over disjoint key sets by LSE, in fp32 (arXiv 2402.17463, alg. 1)."""
    if len(parts) == 1:
        return parts[0]
    lse = parts[0][1]
    for _, other in parts[1:]:
        lse = torch.logaddexp(lse, other)
    out = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for part, part_lse in parts:
        weight = torch.exp(part_lse - lse).nan_to_num_(nan=0.0)
        out.addcmul_(part.float(), weight.unsqueeze(-1))
    return out.to(parts[0][0].dtype), lse


def _attend_math(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Partial:
    scores = scores_fp32(q.flatten(0, 1), k.flatten(0, 1)).view(*q.shape[:3], -1).mul_(scale)
    if bias is not None:
        scores += bias
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights.to(v.dtype), v).float() / total.clamp(min=1e-37)
    return out.to(q.dtype), (top + total.log()).squeeze(-1)


def _rows(x: Tensor, start: int, count: int) -> Tensor:
    """Return the entries of the batch axis, or the one that all share."""
    return x if x.shape[0] == 1 else x[start : start + count]


def _causal_bias(q: Tensor) -> Tensor:
    length = q.shape[2]
    bias = torch.full((length, length), -math.inf, device=q.device)
    return bias.triu_(1)[None, None]


def ordered_kv(cache: PagedKV, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """Return a request's keys and values in order, two of [S, K, D], as the cache has them: views
    where its blocks follow one another there, copies otherwise, and where they are int8."""
    if cache.k_scale is not None:
        cache, block_table = int8_kv.dense_kv(cache, block_table, context_len)
    k, v = _ordered_blocks(cache, block_table[: -(-context_len // cache.k.shape[1])])
    return k.flatten(0, 1)[:context_len], v.flatten(0, 1)[:context_len]


def widened_kv(
    cache: PagedKV, block_table: Tensor, context_len: int, dtype: torch.dtype,
) -> tuple[PagedKV, Tensor]:
    """Write out a request's keys and values, which are kept in fewer bits, in the type that is
    computed in. Returns a cache of the request's blocks in order, and their table."""
    table = block_table[: -(-context_len // cache.k.shape[1])]
    k, v = (part.to(dtype) for part in _ordered_blocks(cache, table))
    means = (None if mean is None else mean[table] for mean in (cache.k_mean, cache.v_mean))
    return PagedKV(k, v, *means), torch.arange(len(table), device=table.device)


def _ordered_blocks(cache: PagedKV, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of a request's n blocks, two of [n, P, K, D]."""
    ids = table.cpu().numpy()
    if (ids[1:] != ids[:-1] + 1).any():
        return cache.k[table], cache.v[table]
    first, stop = int(ids[0]), int(ids[0]) + len(ids)
    return cache.k[first:stop], cache.v[first:stop]


def rotated_queries(q: Tensor, start: int, zone: int, rotary: QueryRotary) -> Tensor:
    """Rotate queries at positions start, start + 1, ... for keys of ``zone``. q: [T, H, D]."""
    positions = torch.arange(start, start + q.shape[0], device=q.device)
    rows = query_position(positions, zone, rotary.stride, rotary.clamp)
    return rotate(q, rotary.cos[rows], rotary.sin[rows])
