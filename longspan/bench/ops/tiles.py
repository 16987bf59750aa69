"""How much a selection costs, counted from the selection itself."""

from __future__ import annotations

import torch

from longspan.ops.geometry import COARSE, near_border
from longspan.ops.sparse.eager_unaligned import window_starts
from longspan.ops.types import Selection


def count_tiles(selection: Selection, start: int, num_queries: int, *, correction: bool) -> float:
    """Count the tiles of P queries by P keys that sparse attention computes, over all heads.

    For each query tile: its windows that exist, the diagonal one whole; the tiles that it lists;
    its columns up to its last query, in tiles of P, rounded up; with ``correction`` the means of
    the tiles before it and those that stand for several tiles, each rounded up as well. Tiles that
    a kernel splits at DCA borders are not counted twice.
    """
    tile_len = selection.tile_len
    device = selection.columns.device
    base = 0 if selection.aligned else start
    first = (start - base) // tile_len
    tiles = torch.arange(first, -(-(start + num_queries - base) // tile_len), device=device)
    ends = base + (tiles + 1) * tile_len
    count = torch.zeros((), dtype=torch.float64, device=device)
    for columns, offsets in zip(selection.columns, selection.offsets, strict=True):
        used = offsets[offsets < tile_len]
        if selection.aligned:  # a window exists as soon as its last key does
            count += (used[:, None] + ends > 0).sum()
        else:
            count += (window_starts(ends - tile_len, used, tile_len) < ends[:, None]).sum()
        visible = torch.searchsorted(columns[columns >= 0], ends)
        count += -(-visible // tile_len).sum()
    if selection.tiles is not None:
        count += (selection.tiles[:, tiles - selection.first_tile] >= 0).sum()
    if correction:
        borders = torch.tensor([near_border(tile, selection.near_tiles)
                                for tile in tiles.tolist()], device=device)
        means = -(-(tiles - borders) // tile_len) - (-borders // (COARSE * tile_len))
        count += means.sum() * selection.columns.shape[0]
    return float(count)


def mean_share(num_tokens: int, tile_len: int, near_len: int) -> float:
    """Return the share of all (query, key) pairs of a prompt that tile means add: a key for each
    tile near the query's, for each `COARSE` tiles beyond."""
    count = 0
    for tile in range(-(-num_tokens // tile_len)):
        border = near_border(tile, near_len // tile_len)
        count += tile - border + border // COARSE
    return 2 * count * tile_len / max(1, num_tokens)**2


def tile_flops(num_tiles: float, tile_len: int, head_dim: int) -> float:
    """Count the operations of two products of P x P x D for each tile."""
    return 4.0 * num_tiles * tile_len * tile_len * head_dim


def causal_flops(num_queries: int, history: int, num_heads: int, head_dim: int) -> float:
    """Count the operations of dense causal attention: only visible pairs count."""
    pairs = num_queries * (history + (num_queries + 1) / 2)
    return 4.0 * pairs * num_heads * head_dim
