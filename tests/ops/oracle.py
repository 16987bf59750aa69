"""Independent oracles in fp64, one pair at a time where that says it best, and test data.

Nothing here uses longspan's position arithmetic, masks or rotations.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.ops.types import PagedKV, QueryRotary, Selection


class Positions(NamedTuple):
    """DCA as released configs state it. chunk_size is the clamp, not the stride."""

    chunk_size: int
    local_size: int

    @property
    def stride(self) -> int:
        return self.chunk_size - self.local_size


def rotated_query(query: int, key: int, positions: Positions) -> int:
    """Rotated position of a query for one key, by the definition in words."""
    stride, clamp = positions.stride, positions.chunk_size
    gap = query // stride - key // stride
    if gap == 0:
        return query % stride
    if gap == 1:
        return min(stride + query % stride, clamp)
    return min(2 * stride - 1, clamp)


def distance(query: int, key: int, positions: Positions) -> int:
    """Distance that RoPE sees for one (query, key) pair."""
    return rotated_query(query, key, positions) - key % positions.stride


def distance_matrix(length: int, positions: Positions, start: int = 0) -> Tensor:
    """[length - start, length] int64 of queries start ...; entries above the diagonal are 0."""
    rows = [[distance(i, j, positions) if j <= i else 0 for j in range(length)]
            for i in range(start, length)]
    return torch.tensor(rows)


def causal(length: int, start: int = 0) -> Tensor:
    """[length - start, length] bool."""
    return torch.arange(length)[None] <= torch.arange(start, length)[:, None]


def scores(q: Tensor, k: Tensor, distances: Tensor, inv_freq: Tensor) -> Tensor:
    """q_i R(distance_ij) k_j in fp64. q: [T, H, D], k: [S, K, D] unrotated -> [H, T, S].

    R turns the query by the distance: for the pair (x, y) of half-split components
    q . R k = cos (qx kx + qy ky) + sin (qy kx - qx ky).
    """
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    (qx, qy), (kx, ky) = (x.transpose(0, 1).chunk(2, -1) for x in (q, k))
    angles = torch.outer(inv_freq.double(), torch.arange(int(distances.max()) + 1).double())
    total = q.new_zeros(q.shape[1], q.shape[0], k.shape[0])
    for i, angle in enumerate(angles):
        cos, sin = angle.cos()[distances], angle.sin()[distances]
        even = qx[..., i, None] * kx[:, None, :, i] + qy[..., i, None] * ky[:, None, :, i]
        odd = qx[..., i, None] * ky[:, None, :, i] - qy[..., i, None] * kx[:, None, :, i]
        total += cos * even + sin * odd
    return total


def attention(
    q: Tensor, k: Tensor, v: Tensor, distances: Tensor, inv_freq: Tensor, scale: float,
    visible: Tensor,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over visible pairs, fp64. visible: [T, S] or [H, T, S].

    Returns out [T, H, D], lse [T, H].
    """
    logits = scores(q, k, distances, inv_freq) * scale
    logits = logits.masked_fill(~visible, -math.inf)
    return _softmax(logits, v.double().repeat_interleave(q.shape[1] // v.shape[1], 1))


def _softmax(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """logits: [H, T, S], values: [S, H, D]. A row that sees no key: out 0, lse -inf."""
    lse = logits.logsumexp(-1)
    weights = (logits - lse.clamp(min=-1e300)[..., None]).exp()
    return torch.einsum("hts,shd->thd", weights, values), lse.T


class Case(NamedTuple):
    """Random inputs of one request and the cache that holds them."""

    q: Tensor
    """[L, H, D] not rotated"""
    k: Tensor
    """[L, K, D] not rotated"""
    v: Tensor
    cache: PagedKV
    block_table: Tensor
    rotary: QueryRotary
    scale: float


def tables(head_dim: int, positions: Positions, length: int, theta: float = 1e4) -> QueryRotary:
    """Rotation tables of fp32 frequencies, computed in fp64 and stored in fp32."""
    inv_freq = (theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)).float()
    rows = torch.arange(min(length, positions.chunk_size + 1)).double()
    angles = torch.outer(rows, inv_freq.double())
    return QueryRotary(angles.cos().float(), angles.sin().float(), inv_freq,
                       positions.stride, positions.chunk_size)


def rotate_pair(x: Tensor, angles: Tensor) -> Tensor:
    """x: [T, H, D], angles: [T, D/2] -> fp64."""
    first, second = x.double().chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def moved(rotary: QueryRotary, device: torch.device | str) -> QueryRotary:
    """The same tables on a device."""
    return rotary._replace(cos=rotary.cos.to(device), sin=rotary.sin.to(device),
                           inv_freq=rotary.inv_freq.to(device))


def make_case(
    length: int, positions: Positions, *, num_heads: int = 7, num_kv_heads: int = 1,
    head_dim: int = 16, block_size: int = 16, shuffled: bool = True, with_means: bool = False,
    dtype: torch.dtype = torch.float32, device: str = "cpu", gain: float = 1.5,
    q: Tensor | None = None, k: Tensor | None = None,
) -> Case:
    """A request of ``length`` tokens wholly in the cache. Slots that hold no token are NaN, so are
    blocks of no request; the block table is a random permutation or consecutive blocks.

    q: [L, H, D] and k: [L, K, D] replace the random ones.
    """
    q = gain * torch.randn(length, num_heads, head_dim) if q is None else q
    k = gain * torch.randn(length, num_kv_heads, head_dim) if k is None else k
    v = torch.randn_like(k)
    num_kv_heads, head_dim = k.shape[1:]
    rotary = tables(head_dim, positions, length)
    local = torch.arange(length) % positions.stride
    rotated = rotate_pair(k.to(dtype), torch.outer(local.double(), rotary.inv_freq.double()))
    num_blocks = -(-length // block_size)
    block_table = torch.randperm(num_blocks + 3) if shuffled else torch.arange(num_blocks + 3) + 2
    block_table = block_table[:num_blocks]
    shape = (num_blocks + 5, block_size, num_kv_heads, head_dim)
    cache_k, cache_v = torch.full(shape, math.nan), torch.full(shape, math.nan)
    position = torch.arange(length)
    slots = block_table[position // block_size] * block_size + position % block_size
    cache_k.view(-1, *shape[2:])[slots] = rotated.float()
    cache_v.view(-1, *shape[2:])[slots] = v
    cache_k, cache_v = cache_k.to(dtype).to(device), cache_v.to(dtype).to(device)
    cache = PagedKV(cache_k, cache_v)
    if with_means:  # those of partly filled blocks NaN
        means = (x.float().mean(1).to(dtype) for x in (cache_k, cache_v))
        cache = PagedKV(cache_k, cache_v, *means)
    rotary = moved(rotary, device)
    return Case(q.to(dtype).to(device), k.to(dtype), v.to(dtype), cache, block_table.to(device),
                rotary, head_dim**-0.5)


def dense(case: Case, positions: Positions, start: int = 0) -> tuple[Tensor, Tensor]:
    """The oracle over a whole case, queries from ``start`` on."""
    length = case.k.shape[0]
    return attention(
        case.q[start:].cpu(), case.k, case.v, distance_matrix(length, positions, start),
        case.rotary.inv_freq.cpu(), case.scale, causal(length, start))


def only_first(case: Case, context_len: int) -> PagedKV:
    """The cache as it stands when ``context_len`` tokens are written; NaN in all other slots."""
    block_size = case.cache.k.shape[1]
    position = torch.arange(context_len, device=case.block_table.device)
    slots = case.block_table[position // block_size] * block_size + position % block_size
    copies = []
    for source in case.cache[:2]:
        copy = torch.full_like(source, math.nan)
        copy.flatten(0, 1)[slots] = source.flatten(0, 1)[slots]
        copies.append(copy)
    means = (x.float().mean(1).to(x.dtype) for x in copies)
    return PagedKV(*copies, *means) if case.cache.k_mean is not None else PagedKV(*copies)


def with_lists(rng: random.Random, selection: Selection, start: int, length: int, most: int = 4,
               skipped: int = 0) -> Selection:
    """A selection in tile mode whose query tiles list further key tiles, from none to ``most``.
    Lists begin ``skipped`` query tiles before the first one."""
    first_tile, end_tile = start // selection.tile_len - skipped, -(-length // selection.tile_len)
    heads = len(selection.offsets)
    tiles = torch.full((heads, end_tile - first_tile, most), -1, dtype=torch.int32)
    for head, offsets in enumerate(selection.offsets.tolist()):
        for row, tile in enumerate(range(first_tile, end_tile)):
            free = [t for t in range(tile) if (t - tile) * selection.tile_len not in offsets]
            chosen = sorted(rng.sample(free, min(len(free), rng.randrange(most + 1))))
            tiles[head, row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return selection._replace(tiles=tiles.to(selection.offsets.device), first_tile=first_tile)


def minference_sweep(
    columns: list[int], distances: list[int], tile_start: int, tile_len: int
) -> tuple[list[int], list[int]]:
    """Serial port of the public index kernel: block starts and single columns of one query tile.
    Ends of windows are clamped to one tile from the prompt's start."""
    end = tile_start + tile_len
    slashes = [d for d in sorted(distances, reverse=True) if d < end]
    if not slashes:
        return [], sorted(columns)
    ends = [max(end - d, tile_len) for d in slashes]
    verticals, blocks, singles = sorted(columns), [], []
    v, s, range_start, range_end = 0, 1, ends[0] - tile_len, ends[0]
    while True:
        if v < len(verticals) and verticals[v] < range_end:
            if verticals[v] < range_start:
                singles.append(verticals[v])
            v += 1
            continue
        if s == len(ends):
            break
        window_end, s = ends[s], s + 1
        if window_end > range_end + tile_len:
            blocks += range(range_start, range_end, tile_len)
            range_start, range_end = window_end - tile_len, window_end
        elif window_end > range_end:
            range_end += tile_len
    return blocks + list(range(range_start, range_end, tile_len)), singles


def union(selection: Selection, start: int, length: int) -> Tensor:
    """Which keys each head's queries start ... length - 1 see, key by key as a set union.

    [H, length - start, length] bool.
    """
    tile_len, columns = selection.tile_len, selection.columns.tolist()
    seen = torch.zeros(len(columns), length - start, length, dtype=torch.bool)
    base = 0 if selection.aligned else start
    for head, offsets in enumerate(selection.offsets.tolist()):
        for query in range(start, length):
            tile_start = base + (query - base) // tile_len * tile_len
            keys = {column for column in columns[head] if column >= 0}
            for tile in listed(selection, head, query):
                keys |= set(range(tile * tile_len, (tile + 1) * tile_len))
            used = [offset for offset in offsets if offset != tile_len]  # but for padding
            starts = [tile_start + offset for offset in used]
            if not selection.aligned:
                starts, _ = minference_sweep([], [-offset for offset in used], tile_start, tile_len)
            for first in starts:
                keys |= set(range(first, first + tile_len))
            kept = [key for key in keys if 0 <= key <= query]
            seen[head, query - start, kept] = True
    return seen


def listed(selection: Selection, head: int, query: int) -> set[int]:
    """Key tiles that the query's own tile lists."""
    if selection.tiles is None:
        return set()
    row = query // selection.tile_len - selection.first_tile
    return set(selection.tiles[head, row].tolist()) - {-1}


def sparse(
    case: Case, positions: Positions, start: int, selection: Selection, correction: bool
) -> tuple[Tensor, Tensor, float]:
    """The oracle of sparse prefill: out, lse, kept pairs."""
    length, heads = case.k.shape[0], case.q.shape[1]
    group = heads // case.k.shape[1]
    inv_freq, q = case.rotary.inv_freq.cpu(), case.q[start:].cpu()
    seen = union(selection, start, length)
    logits = scores(q, case.k, distance_matrix(length, positions, start), inv_freq) * case.scale
    logits = logits.masked_fill(~seen, -math.inf)
    values = case.v.double().repeat_interleave(group, 1)
    if correction:
        extra, means = _mean_terms(case, positions, start, selection)
        logits, values = torch.cat((logits, extra), -1), torch.cat((values, means))
    return *_softmax(logits, values), float(seen.sum())


def _mean_terms(
    case: Case, positions: Positions, start: int, selection: Selection
) -> tuple[Tensor, Tensor]:
    """One mean key and value for each whole tile before the query's own that is neither a window
    nor listed, with the logarithm of the number of its keys that are not columns; far before the
    query for eight tiles together. [H, T, n], [n, H, D]."""
    length, heads, tile_len = case.k.shape[0], case.q.shape[1], selection.tile_len
    group = heads // case.k.shape[1]
    inv_freq = case.rotary.inv_freq.double().cpu()
    local = torch.arange(length).double() % positions.stride
    keys = rotate_pair(case.k, torch.outer(local, inv_freq)).repeat_interleave(group, 1)
    values = case.v.double().repeat_interleave(group, 1)
    num_tiles = (length - 1) // tile_len
    runs = [range(tile, tile + 1) for tile in range(num_tiles)]
    if selection.near_tiles is not None:
        runs += [range(tile, tile + 8) for tile in range(0, num_tiles - 7, 8)]
    logits = torch.full((heads, length - start, len(runs)), -math.inf, dtype=torch.float64)
    means = []
    for place, tiles in enumerate(runs):
        inside = slice(tiles.start * tile_len, tiles.stop * tile_len)
        rows = [rotated_query(i, inside.start, positions) for i in range(start, length)]
        angles = torch.outer(torch.tensor(rows).double(), inv_freq)
        turned = rotate_pair(case.q[start:].cpu(), angles)
        mean_scores = (turned * keys[inside].mean(0)).sum(-1) * case.scale  # [T, H]
        means.append(values[inside].mean(0))
        for head in range(heads):
            columns = set(selection.columns[head].tolist())
            left = inside.stop - inside.start - len(columns & set(range(inside.start, inside.stop)))
            for own in range(start // tile_len, -(-length // tile_len)):
                weight = left * _share(selection, head, own, tiles)
                queries = slice(max(0, own * tile_len - start), (own + 1) * tile_len - start)
                if weight > 0:
                    logits[head, queries, place] = mean_scores[queries, head] + math.log(weight)
    return logits, torch.stack(means) if means else values[:0]


def _share(selection: Selection, head: int, own: int, tiles: range) -> float:
    """How many of these tiles the queries of tile ``own`` see through their common mean alone, of
    all of them."""
    if selection.near_tiles is not None:
        far = [tile for tile in range(own) if tile < (max(0, own - selection.near_tiles) // 8) * 8]
        if (tiles.start in far) is not (len(tiles) == 8):
            return 0.0
    seen = set(selection.offsets[head].tolist())
    free = [tile for tile in tiles if tile < own and (tile - own) * selection.tile_len not in seen
            and tile not in listed(selection, head, own * selection.tile_len)]
    return len(free) / len(tiles)
