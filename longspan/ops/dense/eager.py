"""Dense prefill and decode by zones over PyTorch's fused attention, for CPUs and any GPU.

Same signatures and results as `reference`; work per zone is one fused call, merged by LSE.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.ops.geometry import INTRA, Span, one_query_position, segments
from longspan.ops.geometry import spans as zone_spans
from longspan.ops.tiles.attend import Partial, attend, merge, ordered_kv, rotated_queries
from longspan.ops.tiles.few_calls import rotate
from longspan.ops.types import KeySpans, PagedKV, QueryRotary

KEYS = 65_536
"""Keys that decoding attends to at a time: those in fewer bits are written out."""


def prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.prefill_attention`."""
    context_len = cached_len + q.shape[0]
    k, v = ordered_kv(cache, block_table, context_len)
    outs, lses = [], []
    for start, stop in segments(cached_len, context_len, rotary.stride):
        rows = q[start - cached_len : stop - cached_len]
        out, lse = merge([
            part
            for span in zone_spans(start, stop, rotary.stride)
            for part in _span_parts(rows, k, v, span, start, rotary, scale)
        ])
        outs.append(out.permute(1, 0, 2))
        lses.append(lse.T)
    return torch.cat(outs).contiguous(), torch.cat(lses).contiguous()


def decode_attention(
    q: Tensor, cache: PagedKV, block_tables: Tensor, context_lens: Tensor, rotary: QueryRotary,
    scales: Tensor, spans: KeySpans | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.decode_attention`. One request after another; the host reads lengths."""
    parts = []
    for row, (length, scale) in enumerate(zip(context_lens.tolist(), scales.tolist(), strict=True)):
        first, stop = 0, length
        if spans is not None:
            first = int(spans.first[row])
            stop = first + int(spans.length[row])
        if first == stop:
            parts.append((q.new_zeros(q.shape[1], 1, q.shape[2]),
                          q.new_full((q.shape[1], 1), -math.inf, dtype=torch.float32)))
            continue
        table = block_tables[row, first // cache.k.shape[1] :]
        k, v = ordered_kv(cache, table, stop - first)
        found = []
        for span in zone_spans(length - 1, length, rotary.stride):
            begin = max(_held(span.start, spans, cache), first) - first
            end = min(_held(span.stop, spans, cache), stop) - first
            for key in range(begin, end, KEYS):
                keys = slice(key, min(key + KEYS, end))
                rotated = _rotated_query(q[row : row + 1], length - 1, span.zone, rotary)
                found.append(_attend_history(
                    rotated, k[keys].to(q.dtype), v[keys].to(q.dtype), scale))
        parts.append(merge(found))
    if len(parts) == 1:
        out, lse = parts[0]
        return out.permute(1, 0, 2).contiguous(), lse.T.contiguous()
    return (torch.cat([out.permute(1, 0, 2) for out, _ in parts]).contiguous(),
            torch.cat([lse.T for _, lse in parts]).contiguous())


def _held(position: int, spans: KeySpans | None, cache: PagedKV) -> int:
    """Count the keys before a position that a cache holds."""
    if spans is None or not spans.block_len:
        return position
    part_len, within = cache.k.shape[1], position % spans.block_len - spans.block_start
    return position // spans.block_len * part_len + max(0, min(within, part_len))


def _rotated_query(q: Tensor, position: int, zone: int, rotary: QueryRotary) -> Tensor:
    """Rotate one query, [1, H, D], for keys of ``zone``."""
    row = one_query_position(position, zone, rotary.stride, rotary.clamp)
    return rotate(q, rotary.cos[row : row + 1], rotary.sin[row : row + 1])


def _span_parts(
    q: Tensor, k: Tensor, v: Tensor, span: Span, start: int, rotary: QueryRotary, scale: float
) -> list[Partial]:
    """Compute the partial results [H, T, D] of one zone; the queries' own keys apart, under the
    causal mask. A query alone sees all keys that there are."""
    rotated = rotated_queries(q, start, span.zone, rotary)
    if span.zone != INTRA or q.shape[0] == 1:
        keys = slice(span.start, span.stop)
        return [_attend_history(rotated, k[keys], v[keys], scale)]
    own = _attend_own(rotated, k[start : span.stop], v[start : span.stop], scale)
    if span.start == start:
        return [own]
    return [_attend_history(rotated, k[span.start : start], v[span.start : start], scale), own]


def _attend_history(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """Let all T queries see all S keys. The query heads of a KV head are folded into the rows, so K
    and V are never repeated. q: [T, H, D]; k, v: [S, K, D] -> [H, T, D], [H, T]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    folded = q.permute(1, 0, 2).reshape(1, num_kv_heads, -1, head_dim)
    out, lse = attend(folded, k.permute(1, 0, 2)[None], v.permute(1, 0, 2)[None], scale)
    return out.reshape(num_heads, num_queries, head_dim), lse.reshape(num_heads, num_queries)


def _attend_own(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """Compute the causal attention of a segment to its own keys. q: [T, H, D]; k, v: [T, K, D]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    heads = q.permute(1, 0, 2).reshape(num_kv_heads, -1, num_queries, head_dim)
    group = heads.shape[1]
    keys = k.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1)
    values = v.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1)
    out, lse = attend(heads, keys, values, scale, causal=True)
    return out.reshape(num_heads, num_queries, head_dim), lse.reshape(num_heads, num_queries)
