"""The forward pass of one sparse prefill chunk, piece by piece.

A generator holds what a pause must keep: the hidden states, and inside a layer its queries and the
selection. Every piece calls the same operations on the same rows whether there was a pause or not,
so the numbers are the same. What the pieces are: `longspan.engine.chunking`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from longspan.attention.metadata import AttentionMetadata
from longspan.model.qwen2 import CausalLM, DecoderLayer
from longspan.ops.types import PagedKV


def forward_in_pieces(
    model: CausalLM, hidden_or_ids: Tensor, metadata: AttentionMetadata,
    caches: Sequence[PagedKV], cuts: Sequence[int],
) -> Generator[None, None, Tensor]:
    """`CausalLM.forward` of a single prefill slice; yields after each piece but the last one.

    Args:
        hidden_or_ids, metadata, caches: as there.
        cuts: positions that part the slice's rows, its start and end included.

    Returns what `CausalLM.forward` returns.
    """
    hidden = model.embed(hidden_or_ids)
    wide = replace(metadata, output_rows=None, output=None)
    last = model.layer_range.stop - 1
    layers = zip(model.layer_range, model.decoder_layers(), caches, strict=True)
    for idx, layer, cache in layers:
        if model.is_last and idx == last:
            # keys of all rows, queries of none or one: a piece
            return model.norm(layer(hidden, metadata, cache))
        yield from _layer_in_pieces(layer, hidden, wide, cache, cuts, is_end=idx == last)
    return hidden


def _layer_in_pieces(
    layer: DecoderLayer, hidden: Tensor, metadata: AttentionMetadata, cache: PagedKV,
    cuts: Sequence[int], *, is_end: bool,
) -> Generator[None, None, None]:
    """hidden: [T, M], changed in place."""
    (item,) = metadata.prefills
    attention, start_len = layer.self_attn, item.cached_len
    q, k, v = attention.project(layer.input_layernorm(hidden), None)
    attention.core.store(k, v, cache, metadata)
    del k, v  # a pause keeps what it needs
    yield
    parts = attention.core.prepare(q, cache, item)
    yield
    for start, stop in pairwise(cuts):
        rows = slice(start - start_len, stop - start_len)
        attended = attention.core.attend(q[rows], cache, item, parts, start)
        layer.finish(hidden[rows], attention.o_proj(attended.flatten(1)))
        del attended
        if not (is_end and stop == cuts[-1]):
            yield
