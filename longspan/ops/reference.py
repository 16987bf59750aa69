"""The specification: every attention op in plain fp32 PyTorch, by full score matrices.

Same names and signatures as the fast paths; written to be checked by eye, not to be fast.
Shapes: T query tokens, S key tokens, H query heads, K KV heads, D head dim, P tokens in a KV block.
Every attention op returns ``(out, lse)`` with lse the natural-log sum of exponentials of scaled
scores, fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.ops import int8_kv
from longspan.ops.geometry import COARSE, ZONES, near_border, query_position, zone_of
from longspan.ops.types import KeySpans, PagedKV, QueryRotary, Selection


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in the half-split layout of Hugging Face checkpoints.

    x: [T, H, D]; cos, sin: [T, D/2]. Returns x's dtype; computed in fp32.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / rms(x) * weight over the last axis; x: [..., M], weight: [M]."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute x + residual, which replaces ``residual``, and its norm. x, residual: [T, M].

    Returns the norm and ``residual``.
    """
    residual += x
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up. gate_up: [T, 2F] with gate first. Returns [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def store_kv(
    cache: PagedKV, k: Tensor, v: Tensor, positions: Tensor, slot_mapping: Tensor,
    filled_blocks: Tensor, rotary: QueryRotary,
) -> None:
    """Rotate keys at ``position mod stride`` and store them with their values.

    Args:
        k, v: [T, K, D], not rotated.
        positions: [T] int64, true ones.
        slot_mapping: [T] int64 = block_id * P + offset; -1: this row is not stored.
        filled_blocks: [n] int64, the blocks whose last slot is among them, in any order, -1 for
            none. Where the cache holds tile means, theirs are computed, over all P slots.

    A cache of int8 numbers gets what `longspan.ops.int8_kv` makes of them; its means are those of
    the stored numbers.
    """
    rows = positions % rotary.stride
    k = rotate(k, rotary.cos[rows], rotary.sin[rows])
    kept, due = slot_mapping >= 0, filled_blocks[filled_blocks >= 0]
    if cache.k_scale is not None:
        int8_kv.store(cache, k[kept], v[kept], slot_mapping[kept], due)
        return
    for stored, new, mean in ((cache.k, k, cache.k_mean), (cache.v, v, cache.v_mean)):
        stored.view(-1, *stored.shape[2:])[slot_mapping[kept]] = new[kept].to(stored.dtype)
        if mean is not None:
            mean[due] = stored[due].float().mean(1).to(mean.dtype)


def gather_kv(cache: PagedKV, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """Gather a request's keys and values in order: two of [S, K, D]."""
    if cache.k_scale is not None:
        cache, block_table = int8_kv.dense_kv(cache, block_table, context_len)
    k = cache.k[block_table].flatten(0, 1)[:context_len]
    v = cache.v[block_table].flatten(0, 1)[:context_len]
    return k, v


def prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the causal attention of T new tokens, already in the cache, over ``cached_len + T``
    keys.

    Args:
        q: [T, H, D], not rotated.
        block_table: [>= ceil(S / P)] int64.
    Returns: out [T, H, D] in q's dtype, lse [T, H] fp32.
    """
    num_queries, num_heads, _ = q.shape
    context_len = cached_len + num_queries
    k, v = gather_kv(cache, block_table, context_len)
    queries = torch.arange(cached_len, context_len, device=q.device)
    keys = torch.arange(context_len, device=q.device)
    scores = dca_scores(q, k, queries, keys, rotary) * scale
    scores = scores.masked_fill(keys > queries[:, None], -math.inf)
    return _attend(scores, repeat_heads(v, num_heads), q.dtype)


def decode_attention(
    q: Tensor, cache: PagedKV, block_tables: Tensor, context_lens: Tensor, rotary: QueryRotary,
    scales: Tensor, spans: KeySpans | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with one new token for each of B requests; its own key is already in the cache.

    q: [B, H, D] not rotated; block_tables: [B, max blocks]; context_lens: [B]; scales: [B].
    With ``spans`` only their keys are attended to; without any, out is 0 and lse -inf.
    Returns: out [B, H, D], lse [B, H].
    """
    parts, part_len = [], cache.k.shape[1]
    for row, length in enumerate(context_lens.tolist()):
        keys = torch.arange(length, device=q.device)
        if spans is not None and spans.block_len:  # a part of each block
            keys = torch.arange(-(-length // spans.block_len) * part_len, device=q.device)
            keys = keys // part_len * spans.block_len + spans.block_start + keys % part_len
        k, v = gather_kv(cache, block_tables[row], len(keys))
        k, v = k[keys < length], v[keys < length]  # other slots hold anything
        keys = keys[keys < length]
        last = torch.tensor([length - 1], device=q.device)
        scores = dca_scores(q[row : row + 1], k, last, keys, rotary) * float(scales[row])
        if spans is not None:
            first, count = int(spans.first[row]), int(spans.length[row])
            places = torch.arange(len(keys), device=q.device)
            scores = scores.masked_fill((places < first) | (places >= first + count), -math.inf)
        out, lse = _attend(scores, repeat_heads(v, q.shape[1]), q.dtype)
        parts.append((out, lse))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def sparse_prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, selection: Selection, correction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `prefill_attention` over the selected windows, listed tiles and columns only.

    With ``correction`` (tile mode only), every whole tile before the query's own that is neither a
    window nor listed takes part as one key and one value, the tile's means, with the logarithm of
    the number of its keys that are not columns added to the logit. Far before the query (see
    `Selection.near_tiles`) `COARSE` tiles are one: the mean of all their keys, with the logarithm
    of those that are not columns, times the share of the tiles that the query does not see.
    Returns: out, lse as in `prefill_attention`, and the number of (query, key) pairs kept, fp64.
    """
    num_queries, num_heads, _ = q.shape
    context_len = cached_len + num_queries
    k, v = gather_kv(cache, block_table, context_len)
    queries = torch.arange(cached_len, context_len, device=q.device)
    keys = torch.arange(context_len, device=q.device)
    scores = dca_scores(q, k, queries, keys, rotary) * scale
    kept = kept_pairs(selection, queries, context_len)
    scores = scores.masked_fill(~kept, -math.inf)
    values = repeat_heads(v, num_heads)
    if correction:
        mean_scores, mean_values = _correction(
            q, cache, block_table, queries, rotary, scale, selection)
        scores = torch.cat((scores, mean_scores), -1)
        values = torch.cat((values, mean_values), 0)
    return *_attend(scores, values, q.dtype), kept.sum(dtype=torch.float64)


def dca_scores(
    q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, rotary: QueryRotary
) -> Tensor:
    """Compute q . k with each pair's zone rotation. q: [T, H, D] raw, k: [S, K, D] rotated
    -> [H, T, S]."""
    k = repeat_heads(k, q.shape[1])
    zone = zone_of(queries[:, None], keys[None, :], rotary.stride)
    scores = q.new_zeros(q.shape[1], len(queries), len(keys), dtype=torch.float32)
    for z in ZONES:
        rows = query_position(queries, z, rotary.stride, rotary.clamp)
        rows = rows.clamp(max=rotary.cos.shape[0] - 1)  # zones that no pair lies in may exceed it
        rotated = rotate(q.float(), rotary.cos[rows], rotary.sin[rows])
        scores = torch.where(zone == z, torch.einsum("thd,shd->hts", rotated, k), scores)
    return scores


def kept_pairs(selection: Selection, queries: Tensor, context_len: int) -> Tensor:
    """Return which keys each query sees. queries: [T] consecutive positions -> [H, T, S] bool."""
    keys = torch.arange(context_len, device=queries.device)
    tile_start = _tile_start(selection, queries)
    num_heads = selection.columns.shape[0]
    shape = num_heads, len(queries), context_len
    kept = torch.zeros(shape, dtype=torch.bool, device=queries.device)
    for head in range(num_heads):
        for tile in tile_start.unique().tolist():
            rows = tile_start == tile
            for first in _window_starts(selection, head, tile):
                kept[head, rows, max(first, 0) : max(first + selection.tile_len, 0)] = True
        columns = selection.columns[head]
        kept[head][:, columns[columns >= 0]] = True
    if selection.tiles is not None:
        listed = listed_tiles(selection, queries, -(-context_len // selection.tile_len))
        kept |= listed.repeat_interleave(selection.tile_len, -1)[..., :context_len]
    return kept & (keys <= queries[:, None])


def _window_starts(selection: Selection, head: int, tile_start: int) -> list[int]:
    """Return the first key of each window of one query tile; those of tile mode may lie before key
    0."""
    tile_len = selection.tile_len
    offsets = [offset for offset in selection.offsets[head].tolist() if offset < tile_len]
    if selection.aligned:
        return [tile_start + offset for offset in offsets]
    return paper_windows(offsets, tile_start, tile_len)


def paper_windows(offsets: list[int], tile_start: int, tile_len: int) -> list[int]:
    """Cover the diagonals of one query tile with windows by MInference's public index rules.

    A diagonal's range begins at key tile_start + offset, or at key 0 where that lies before it; a
    diagonal that does not reach the tile has none. From the farthest on: a range that ends more
    than P keys after the last window opens a window at its own keys, one that ends later at all
    adds a window behind the last one, which may cover a little more than asked.

    offsets: 0 or less, descending. Returns first keys, ascending; the last window may reach past
    the tile, where the causal mask cuts it.
    """
    starts: list[int] = []
    for offset in reversed(offsets):
        first = max(tile_start + offset, 0)
        if tile_start + offset + tile_len <= 0:
            continue
        if not starts or first > starts[-1] + tile_len:
            starts.append(first)
        elif first > starts[-1]:
            starts.append(starts[-1] + tile_len)
    return starts


def listed_tiles(selection: Selection, queries: Tensor, num_tiles: int) -> Tensor:
    """Return which key tiles the query's tile lists. queries: [T] -> [H, T, num_tiles] bool."""
    shape = selection.columns.shape[0], len(queries), num_tiles + 1  # the last one takes padding
    listed = torch.zeros(shape, dtype=torch.bool, device=queries.device)
    if selection.tiles is not None:
        tiles = selection.tiles[:, queries // selection.tile_len - selection.first_tile].long()
        listed.scatter_(2, tiles.where(tiles >= 0, num_tiles), True)
    return listed[..., :num_tiles]


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat [S, K, D] to [S, H, D] fp32 for GQA: KV head h // (H / K) serves query head h."""
    return x.float().repeat_interleave(num_heads // x.shape[1], dim=1)


def _tile_start(selection: Selection, queries: Tensor) -> Tensor:
    base = 0 if selection.aligned else int(queries[0])
    return (queries - base) // selection.tile_len * selection.tile_len + base


def _correction(
    q: Tensor, cache: PagedKV, block_table: Tensor, queries: Tensor, rotary: QueryRotary,
    scale: float, selection: Selection,
) -> tuple[Tensor, Tensor]:
    """Return scores [H, T, n] and values [n, H, D] of the n means: of single tiles, and of `COARSE`
    tiles together."""
    assert selection.aligned and cache.k_mean is not None and cache.v_mean is not None
    tile_len = selection.tile_len
    num_tiles = int(queries[-1]) // tile_len
    table = block_table[:num_tiles]
    k_mean, v_mean = cache.k_mean[table], cache.v_mean[table]
    own = queries // tile_len
    border = torch.tensor([near_border(tile, selection.near_tiles) for tile in own.tolist()],
                          device=q.device)
    dropped, columns = _dropped_tiles(selection, own, num_tiles)
    near = dropped & (torch.arange(num_tiles, device=q.device) >= border[:, None])
    weights = (near * (tile_len - columns)[:, None]).float()
    groups = int(border.max()) // COARSE
    far = slice(0, groups * COARSE)
    assert groups == 0 or rotary.stride % (COARSE * tile_len) == 0 or (
        queries[-1] < rotary.stride), "a coarse mean lies in one zone"
    free = dropped[..., far].unflatten(2, (groups, COARSE)).sum(3)
    free *= torch.arange(groups, device=q.device) * COARSE < border[:, None]
    left = COARSE * tile_len - columns[:, far].unflatten(1, (groups, COARSE)).sum(2)
    weights = torch.cat((weights, free * left[:, None] / COARSE), 2)
    k_mean, v_mean = (
        torch.cat((x, x[far].unflatten(0, (groups, COARSE)).float().mean(1).to(x.dtype)))
        for x in (k_mean, v_mean))
    first_keys = torch.cat((torch.arange(num_tiles, device=q.device),
                            torch.arange(groups, device=q.device) * COARSE)) * tile_len
    scores = dca_scores(q, k_mean, queries, first_keys, rotary) * scale
    return scores + weights.log(), repeat_heads(v_mean, q.shape[1])


def _dropped_tiles(selection: Selection, own: Tensor, num_tiles: int) -> tuple[Tensor, Tensor]:
    """Return which tiles before their own queries see neither as a window nor listed,
    [H, T, num_tiles] bool, and how many keys of each are columns, [H, num_tiles]. own: [T]."""
    gap = own[:, None] - torch.arange(num_tiles, device=own.device)
    dropped = ~listed_tiles(selection, own * selection.tile_len, num_tiles) & (gap > 0)
    counts = []
    for head, (columns, offsets) in enumerate(
            zip(selection.columns, selection.offsets, strict=True)):
        tiles = columns[columns >= 0] // selection.tile_len
        counts.append(torch.bincount(tiles, minlength=num_tiles)[:num_tiles])
        windows = -offsets[offsets < selection.tile_len] // selection.tile_len
        dropped[head] &= ~torch.isin(gap, windows)
    return dropped, torch.stack(counts)


def _attend(scores: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attend: scores [H, T, S], v [S, H, D] -> out [T, H, D], lse [T, H]. A row without keys: 0,
    -inf."""
    lse = torch.logsumexp(scores, -1)
    finite = lse.clamp(min=torch.finfo(torch.float32).min)
    out = torch.einsum("hts,shd->thd", torch.exp(scores - finite[..., None]), v)
    return out.to(dtype), lse.T.contiguous()


def route(logits: Tensor, num_chosen: int, is_normed: bool) -> tuple[Tensor, Tensor]:
    """Choose each token's experts, those of the highest probability.

    logits: [T, E] fp32. Returns weights [T, k] fp32, their probabilities, divided by their sum if
    ``is_normed``, and experts [T, k] int64.
    """
    weights, experts = logits.float().softmax(-1).topk(num_chosen)
    return (weights / weights.sum(-1, keepdim=True) if is_normed else weights), experts


def add_routed_mlp(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor,
) -> None:
    """Add to each token the weighted outputs of its experts, SwiGLU MLPs, in place.

    sums, x: [T, M]; weights: [T, k] fp32 and experts: [T, k], as `route` returns them;
    gate_up: [E, 2F, M]; down: [E, M, F]. An expert E, with a weight of 0, is not here: nothing is
    added for it.
    """
    for token, row in enumerate(x.float()):
        total = sums[token].float()
        for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
            if expert == gate_up.shape[0]:
                continue
            gate, up = (gate_up[expert].float() @ row).chunk(2)
            total = total + weight * (down[expert].float() @ (torch.nn.functional.silu(gate) * up))
        sums[token] = total.to(sums.dtype)
