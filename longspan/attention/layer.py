"""DualChunkAttention: rotate and write keys, then dense, sparse or decode attention per request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from longspan import ops
from longspan.attention.divided_kv import collect
from longspan.attention.metadata import AttentionMetadata, DecodeGroup, PrefillPart, PrefillSlice
from longspan.attention.observer import UNWATCHED, AttendedRows, AttentionObserver, Region
from longspan.attention.ranks import HeadPart, RankGroup
from longspan.attention.shared_selection import Found, budget_of, select_together
from longspan.attention.sparsity import SparsityPlan, needs_means
from longspan.ops.geometry import segments
from longspan.ops.types import PagedKV, QueryRotary, Selection

Selector = Callable[..., Selection]
"""With the arguments and the result of `ops.select_vertical_slash`."""
RECALL_LAYERS = 4
"""Recall is measured in every so many layers: the pass over all keys takes time."""


class DualChunkAttention:
    """Attention of one layer over the paged KV cache (arXiv 2501.15383 sections 5.1-5.2).

    Knows no engine type. Counts the (query, key) pairs that prefill kept and could have kept, over
    all heads, for the density report.

    Args:
        observer: told what each prefill does; see `longspan.attention.observer`.
        ranks: have the layer's other heads; None: they are all here.

    ``selector`` stands in for the product's selection where benchmarks compare it with others.
    """

    def __init__(
        self, *, layer_idx: int, num_heads: int, num_kv_heads: int, head_dim: int,
        rotary: QueryRotary, plan: SparsityPlan | None,
        observer: AttentionObserver | None = None, ranks: RankGroup | None = None,
    ) -> None:
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rotary, self._ranks = rotary, ranks
        self.plan = plan
        self.budget = plan.layer(layer_idx) if plan else None
        self._first_sparse = plan.first_sparse(layer_idx) if plan else 0
        self.observer = observer
        self.selector: Selector | None = None
        self.reset_stats()

    def reset_stats(self) -> None:
        """Start counting pairs anew."""
        self.kept_pairs: Tensor | float = 0.0
        self.causal_pairs = 0.0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PagedKV, metadata: AttentionMetadata
    ) -> Tensor:
        """Attend. q: [T, H, D], k, v: [T, K, D], none rotated. Returns [T, H, D]."""
        self.store(k, v, cache, metadata)
        metadata = metadata.output or metadata
        outs = [self._prefill(q[item.start : item.start + item.num_rows], cache, item)
                for item in metadata.prefills]
        if metadata.decode is not None:
            outs.append(self._decode(q[metadata.decode.start :], cache, metadata.decode))
        return _joined(outs) if outs else q

    def store(self, k: Tensor, v: Tensor, cache: PagedKV, metadata: AttentionMetadata) -> None:
        """Rotate the step's keys and write them and the values. k, v: [S, K, D], in the order of
        its slots."""
        ops.store_kv(cache, k, v, metadata.positions, metadata.slot_mapping,
                     metadata.filled_blocks, self.rotary)

    def collect(self, cache: PagedKV, item: PrefillSlice) -> tuple[PagedKV, PrefillSlice]:
        """Return a cache that has all keys of a slice, whose own are stored, and the slice in it;
        they are as they were where this rank has them."""
        share = item.share
        if share is None or not share.divides_kv:
            return cache, item
        whole, table = collect(share.group, cache, item.block_table,
                               means=item.sparse and needs_means(self.plan))
        return whole, replace(item, block_table=table)

    def begin_prepare(self, q: Tensor, item: PrefillSlice) -> Callable[[], Tensor] | None:
        """Begin what `prepare` needs of other ranks while keys are stored; None: nothing.
        q: [T, H, D], the slice's rows here."""
        if not self.exchanges(item):
            return None
        assert item.share is not None
        return item.share.begin_to_heads(
            lambda heads: q[:, heads], self.num_heads, self.num_kv_heads).wait

    def exchanges(self, item: PrefillSlice) -> bool:
        """Return whether ranks exchange a slice's queries: they select for it together."""
        first, stop = self._sparse_range(item, 1)
        return item.share is not None and item.share.is_split and first < stop

    def prepare(
        self, q: Tensor, cache: PagedKV, item: PrefillSlice,
        arrive: Callable[[], Tensor] | None = None,
    ) -> list[PrefillPart]:
        """Select keys for one slice, whose own are stored and collected.

        Args:
            q: [T, H, D], its rows here.
            arrive: what `begin_prepare` returned.
        """
        self.causal_pairs += self.num_heads * item.num_pairs
        first, stop = self._sparse_range(item, cache.k.shape[1])
        q = q if arrive is None else arrive()
        if first >= stop:
            return [PrefillPart(item.cached_len, item.context_len, None)]
        cache, item = self._plain(q, cache, item)
        assert self.budget is not None
        select: Callable[..., Found] = self._select
        if arrive is not None:
            select = partial(select_together, self._select, self.budget)
        sparse = []
        for start, end in segments(first, stop, self.rotary.stride):
            rows, count = q[start - item.cached_len : end - item.cached_len], end - start
            selection, recall = select(rows, cache, item, start)
            if recall is not None and self._ranks is not None:
                recall = self._ranks.gather(recall).flatten(0, 1)
            item.add_recall(recall, count, self.layer_idx)
            sparse.append(PrefillPart(start, end, selection))
        parts = [PrefillPart(item.cached_len, first, None), *sparse,
                 PrefillPart(stop, item.context_len, None)]
        return [part for part in parts if part.start < part.stop]

    def attend_rows(
        self, q: Tensor, cache: PagedKV, item: PrefillSlice, parts: Sequence[PrefillPart],
        first: int = 0,
    ) -> Tensor:
        """Attend with some of the slice's rows here, from its row ``first`` on: see `attend`."""
        outs = [self.attend(q[rows], cache, item, parts, start)
                for rows, start in item.runs(first, q.shape[0])]
        return _joined(outs) if outs else q

    def attend(
        self, q: Tensor, cache: PagedKV, item: PrefillSlice, parts: Sequence[PrefillPart],
        start: int,
    ) -> Tensor:
        """Attend with some rows of a prepared slice.

        q: [n, H, D], queries at positions start ... start + n - 1; in tile mode ``start`` and, but
        at the part's end, n are multiples of the tile length. Returns [n, H, D].
        """
        stop, outs = start + q.shape[0], []
        cache, item = self._plain(q, cache, item)
        for part in parts:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                rows = q[first - start : last - start]
                outs.append(self._dense(rows, cache, item, first) if part.selection is None
                            else self._sparse(rows, cache, item, first, part.selection))
        return _joined(outs)

    def _decode(self, q: Tensor, cache: PagedKV, group: DecodeGroup) -> Tensor:
        share = group.share
        out, lse = ops.decode_attention(
            q, cache, group.block_tables, group.context_lens, self.rotary, group.scales,
            None if share is None else share.spans)
        return out if share is None else share.merge(out, lse, q.dtype)

    def _prefill(self, q: Tensor, cache: PagedKV, item: PrefillSlice) -> Tensor:
        cache, item = self._plain(q, *self.collect(cache, item))
        arrive = self.begin_prepare(q, item)
        return self.attend_rows(q, cache, item, self.prepare(q, cache, item, arrive))

    def _plain(self, q: Tensor, cache: PagedKV, item: PrefillSlice) -> tuple[PagedKV, PrefillSlice]:
        """Return a cache that all ops read, for as long as they run, and the slice in it."""
        plain, table = ops.readable_kv(q, cache, item.block_table, item.context_len, self.rotary)
        return plain, item if table is item.block_table else replace(item, block_table=table)

    def _sparse_range(self, item: PrefillSlice, block_size: int) -> tuple[int, int]:
        """Return the positions [first, stop) computed sparsely: in tile mode whole tiles, and none
        that the slash budget covers wholly."""
        if not item.sparse or self.plan is None or self.budget is None:
            return 0, 0
        stop = item.context_len
        if self.plan.mode == "paper":
            return item.cached_len, stop
        first = max(item.cached_len, self._first_sparse)
        return -(-first // block_size) * block_size, stop // block_size * block_size

    def _dense(self, q: Tensor, cache: PagedKV, item: PrefillSlice, start: int) -> Tensor:
        self._count(item, self.num_heads * q.shape[0] * (start + (q.shape[0] + 1) / 2))
        with self._region("dense"):
            out, lse = ops.prefill_attention(
                q, cache, item.block_table, start, self.rotary, item.scale)
        self._tell(q, cache, item, start, None, lse)
        return out

    def _select(
        self, q: Tensor, cache: PagedKV, item: PrefillSlice, start: int,
        part: HeadPart | None = None,
    ) -> Found:
        """Select for consecutive queries from ``start`` on, and measure the recall where this layer
        does: [H, R]. With a ``part``, q and the cache are of those heads only."""
        budget = budget_of(self.budget, part)
        args = q, cache, item.block_table, start, self.rotary, item.scale
        with self._region("selection"):
            selection = (self.selector or ops.select_vertical_slash)(*args, budget)
            if (selection.aligned and item.recall is not None
                    and self.layer_idx % RECALL_LAYERS == 0):
                return selection, ops.measure_recall(*args, selection)
        return selection, None

    def _sparse(
        self, q: Tensor, cache: PagedKV, item: PrefillSlice, start: int, selection: Selection,
    ) -> Tensor:
        assert self.plan is not None
        with self._region("sparse"):
            out, lse, kept = ops.sparse_prefill_attention(
                q, cache, item.block_table, start, self.rotary, item.scale, selection,
                self.plan.mean_correction)
        self._count(item, kept)
        self._tell(q, cache, item, start, selection, lse)
        return out

    def _region(self, name: Region) -> AbstractContextManager[None]:
        return UNWATCHED if self.observer is None else self.observer.region(name)

    def _tell(
        self, q: Tensor, cache: PagedKV, item: PrefillSlice, start: int,
        selection: Selection | None, lse: Tensor,
    ) -> None:
        if self.observer is not None:
            self.observer.attended(AttendedRows(
                layer_idx=self.layer_idx, q=q, start=start, cache=cache, item=item,
                rotary=self.rotary, selection=selection, lse=lse,
                correction=self.plan is not None and self.plan.mean_correction))

    def _count(self, item: PrefillSlice, kept: Tensor | float) -> None:
        if item.share is None or item.share.counts:
            self.kept_pairs = self.kept_pairs + kept


def _joined(outs: list[Tensor]) -> Tensor:
    """Return the rows one after the other; a copy only where there are several parts."""
    return outs[0] if len(outs) == 1 else torch.cat(outs)
