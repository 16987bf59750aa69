"""The sparse sections of `longspan bench ops`: selection, sparse prefill, whole prefills, RoPE."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import ops
from longspan.attention.layer import DualChunkAttention
from longspan.attention.metadata import SequenceSlice, build_metadata
from longspan.bench.ops import checks
from longspan.bench.ops.dense import LayerBench
from longspan.bench.ops.inputs import BLOCK_SIZE, LayerInput, last_segment, make_rotary
from longspan.bench.ops.tiles import causal_flops, count_tiles, tile_flops
from longspan.bench.timing import Regions, measure_together, rate, rounded
from longspan.errors import LongspanError
from longspan.ops.types import PagedKV, QueryRotary, Selection

MIB = 1024**2
PARTS = {"selection_ms": "selection", "attention_ms": "sparse", "dense_ms": "dense"}
"""Row field to region of the attention layer."""


class Segment(NamedTuple):
    """Queries of one DCA chunk, what they attend to, and how."""

    item: LayerInput
    q: Tensor
    start: int
    layer: int

    @property
    def stop(self) -> int:
        """Context length."""
        return self.start + self.q.shape[0]

    @property
    def args(self) -> tuple[Tensor, PagedKV, Tensor, int, QueryRotary, float]:
        """As the attention ops take them."""
        item = self.item
        table = item.block_table[: -(-self.stop // BLOCK_SIZE)]
        return self.q, item.cache, table, self.start, item.rotary, item.scale


class SparseBench:
    """Sections that select."""

    def __init__(self, layer: LayerBench) -> None:
        self.layer, self.session, self.shape = layer, layer.session, layer.shape
        self.options, self.device = layer.options, layer.device
        self.plan, self.model = layer.shape.plan, layer.shape.model
        self.typical_layer = typical_layer(self.plan.vertical, self.plan.slash)

    # -- one prefill chunk ---------------------------------------------------------------------

    def chunks(self) -> None:
        """Measure selection and sparse attention of the last prefill chunk of each length."""
        for length in sorted(self.options.lengths, reverse=True):
            self._chunk(length, "random")

    def contents(self) -> None:
        """Measure the same at the longest length for other contents."""
        for content in self.options.contents:
            if content != "random":
                self._chunk(max(self.options.lengths), content)
                self._whole(max(self.options.lengths), content)

    def _chunk(self, length: int, content: str) -> None:
        start, count = last_segment(
            length, self.options.chunk_len, self.shape.model.dca.dca_chunk_len
            if self.shape.model.dca else length)
        params = self.layer.params(num_queries=count, context_len=start + count, content=content,
                                   plan=self.shape.plan_label, layer=self.typical_layer)
        self.session.attempt({"op": "select", "impl": "ours", "params": params},
                             partial(self._select, start, count, content))
        self.session.attempt({"op": "sparse_chunk", "impl": "ours", "params": params},
                             partial(self._attend, start, count, content))

    def _segment(self, start: int, count: int, content: str) -> Segment:
        item = self.layer.input(content)
        return Segment(item, item.make_queries(start, count), start, self.typical_layer)

    def _require(self) -> float:
        budget, correction = self.plan.layer(self.typical_layer), self.plan.mean_correction
        return self.layer.require("sparse", lambda: checks.check_sparse(
            self.shape, self.device, budget, correction))

    def _choose(self, segment: Segment) -> Selection:
        return ops.select_vertical_slash(*segment.args, self.plan.layer(segment.layer))

    def _run(self, segment: Segment, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
        return ops.sparse_prefill_attention(*segment.args, selection, self.plan.mean_correction)

    def _select(self, start: int, count: int, content: str) -> dict[str, Any]:
        self._require()
        segment = self._segment(start, count, content)
        checks.check_sound(self._choose(segment), segment.stop, self.model.num_heads)
        workspace = self._workspace_bytes(segment)
        timing = self.layer.measure(lambda: self._choose(segment))
        return {**timing.fields(), "workspace_mib": workspace}

    def _attend(self, start: int, count: int, content: str) -> dict[str, Any]:
        small = self._require()
        segment = self._segment(start, count, content)
        selection = self._choose(segment)
        out, lse, kept = self._run(segment, selection)
        error = small
        if selection.aligned:
            error = max(small, checks.check_rows(
                "sparse_prefill_attention", (out, lse), segment.q, segment.item, start, selection,
                self.plan.mean_correction))
        del out, lse
        timing = self.layer.measure(lambda: self._run(segment, selection))
        tiles = count_tiles(selection, start, count, correction=self.plan.mean_correction)
        flops = tile_flops(tiles, selection.tile_len, self.model.head_dim)
        return {**timing.fields(), "num_tiles": tiles, "tflops": rate(flops, timing),
                **self._shares(start, count, float(kept), flops),
                **self._parts(segment, selection, timing.n, flops), "rel_error": rounded(error)}

    def _parts(
        self, segment: Segment, selection: Selection, repeats: int, flops: float,
    ) -> dict[str, Any]:
        """Measure where the time goes on Hopper, and the kernel's own rate over the tiles that it
        computes."""
        if not self.device.startswith("cuda"):
            return {}
        from longspan.ops.sparse.hopper import launch
        from longspan.ops.sparse.layout import prepare
        from longspan.ops.tiles.hopper import TILE_LEN, supports
        from longspan.ops.tiles.rotary import rotated_query_variants

        q, cache, table, start, rotary, scale = segment.args
        if not (selection.aligned and supports(q, cache, rotary, segment.stop)):
            return {}
        regions = Regions(self.device)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)
        for _ in range(repeats):
            with regions.region("prepare"):
                work = prepare(selection, cache, table, start, segment.stop, rotary.stride,
                               self.plan.mean_correction)
            with regions.region("rotated_query_variants"):
                variants = rotated_query_variants(q, start, rotary, scale, TILE_LEN)
            with regions.region("launch"):
                launch(variants, cache, table, work, out, lse, start)
        parts = {name: total / repeats for name, total in regions.totals_ms().items()}
        return {"parts_ms": {name: rounded(value, 4) for name, value in parts.items()},
                "kernel_tflops": rounded(flops / parts["launch"] / 1e9, 4)}

    def _shares(self, start: int, count: int, kept: float, flops: float) -> dict[str, Any]:
        dense = causal_flops(count, start, self.model.num_heads, self.model.head_dim)
        pairs = self.model.num_heads * count * (start + (count + 1) / 2)
        return {"density": rounded(kept / pairs, 4), "computed_share": rounded(flops / dense, 4)}

    def _workspace_bytes(self, segment: Segment) -> float | None:
        """Return the peak of the allocator during selection, MiB; None on CPUs."""
        if not self.device.startswith("cuda"):
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._choose(segment)
        peak = torch.cuda.max_memory_allocated(self.device)
        return rounded((peak - before) / MIB, 4)

    # -- whole prefills ------------------------------------------------------------------------

    def whole(self) -> None:
        """Measure all attention of prompts of every length, selection included, beside dense."""
        for length in sorted(self.options.lengths, reverse=True):
            for name, curve in self.layer.curves.items():
                if len(curve) < 2:
                    continue
                self.session.attempt(
                    {"op": "whole_dense", "impl": name, "params": self.layer.params(
                        num_tokens=length, chunk_len=self.options.chunk_len)},
                    partial(dense_sum, curve, length, self.options.chunk_len), ours=name == "ours")
            self._whole(length, "random")

    def _whole(self, length: int, content: str) -> None:
        params = self.layer.params(
            num_tokens=length, chunk_len=self.options.chunk_len, content=content,
            plan=self.shape.plan_label)
        self.session.attempt({"op": "whole_sparse", "impl": "ours", "params": params},
                             partial(self._prefill, length, content))

    def _prefill(self, length: int, content: str) -> dict[str, Any]:
        self._require()
        self.layer.require_dense()
        item = self.layer.input(content)
        layers = spread(self.model.num_layers, self.options.layers)
        for layer in layers:  # kernels are compiled for each layer's budgets
            self._pass(item, length, layer)
        totals = [self._pass(item, length, layer) for layer in layers]
        sums = [sum(total.values()) for total in totals]
        mean = {field: statistics.mean(total.get(region, 0.0) for total in totals)
                for field, region in PARTS.items()}
        row = {"time_ms": rounded(statistics.mean(sums), 5), "low_ms": rounded(min(sums), 5),
               "high_ms": rounded(max(sums), 5), "n": 1, "layers_measured": layers,
               **{field: rounded(value, 5) for field, value in mean.items()}}
        return row | self._against_dense(statistics.mean(sums), length)

    def _against_dense(self, time_ms: float, length: int) -> dict[str, Any]:
        """Return the ratio to the fastest dense implementation of this run, where its chunks are
        measured."""
        sums = {name: dense_sum(curve, length, self.options.chunk_len)["time_ms"]
                for name, curve in self.layer.curves.items() if len(curve) > 1}
        if not sums:
            return {}
        best = min(sums, key=sums.__getitem__)
        return {"dense_impl": best, "dense_ms": sums[best],
                "ratio": rounded(sums[best] / time_ms, 4)}

    def _pass(self, item: LayerInput, length: int, layer_idx: int) -> dict[str, float]:
        """Time one layer's attention over a prompt, chunk by chunk as the engine does it, ms by
        part."""
        regions = Regions(self.device)
        core = DualChunkAttention(
            layer_idx=layer_idx, num_heads=self.model.num_heads, head_dim=self.model.head_dim,
            num_kv_heads=self.model.num_kv_heads, rotary=item.rotary, plan=self.plan,
            observer=regions)
        for start in range(0, length, self.options.chunk_len):
            stop = min(start + self.options.chunk_len, length)
            metadata = build_metadata(
                [SequenceSlice(query_len=stop - start, cached_len=start, prompt_len=length,
                               block_ids=range(-(-stop // BLOCK_SIZE)), sparse=True)],
                block_size=BLOCK_SIZE, head_dim=self.model.head_dim, dca=self.model.dca,
                device=self.device)
            q = item.make_queries(start, stop - start)
            core(q, item.k[start:stop], item.v[start:stop], item.cache, metadata)
        return regions.totals_ms()

    # -- plain RoPE ----------------------------------------------------------------------------

    def positions(self) -> None:
        """Measure Dual Chunk Attention against plain RoPE on the last chunk of the longest
        prompt."""
        dca = self.model.dca
        if dca is None:
            raise LongspanError(f"{self.shape.name} has no dual chunk attention to compare")
        length = max(self.options.lengths)
        start, count = last_segment(length, self.options.chunk_len, dca.dca_chunk_len)
        for op in ("dense_chunk", "sparse_chunk"):
            params = self.layer.params(num_queries=count, context_len=start + count)
            self.session.attempt(
                {"op": f"{op}_dca_over_rope", "impl": "ours", "params": params},
                partial(self._both_positions, op, start, count))

    def _both_positions(self, op: str, start: int, count: int) -> dict[str, Any]:
        self._require()
        self.layer.require_dense()
        # The cached keys are those of one rotation: times do not depend on their values.
        segment = self._segment(start, count, "random")
        plain = make_rotary(self.shape, segment.item.num_tokens, self.device, None)
        other = segment._replace(item=segment.item.reading_with(plain))
        timings = measure_together(
            [partial(self._one_position, op, part) for part in (segment, other)], self.device,
            self.options.repeats)
        dca, rope = timings
        return {**dca.fields(), "rope_ms": rounded(rope.median_ms, 5), "slowdown_percent":
                rounded(100 * (dca.median_ms / rope.median_ms - 1))}

    def _one_position(self, op: str, segment: Segment) -> None:
        if op == "dense_chunk":
            ops.prefill_attention(*segment.args)
        else:
            self._run(segment, self._choose(segment))


def dense_sum(curve: Mapping[int, float], length: int, chunk_len: int) -> dict[str, Any]:
    """Estimate a whole dense prefill as the sum of its chunks, from chunk times measured at some
    histories and straight lines between them (a chunk's work grows linearly with its history)."""
    assert len(curve) > 1, "two histories at least"
    points = sorted(curve.items())
    total = 0.0
    for start in range(0, length, chunk_len):
        share = min(chunk_len, length - start) / chunk_len
        total += share * _line(points, start)
    return {"time_ms": float(f"{total:.5g}"), "histories": [history for history, _ in points]}


def _line(points: Sequence[tuple[int, float]], at: float) -> float:
    left = max((point for point in points[:-1] if point[0] <= at), default=points[0])
    right = points[points.index(left) + 1]
    return left[1] + (right[1] - left[1]) * (at - left[0]) / (right[0] - left[0])


def spread(num_layers: int, count: int) -> list[int]:
    """Return ``count`` layers, evenly spaced; all where there are no more."""
    count = max(1, min(count, num_layers))
    return [int((index + 0.5) * num_layers / count) for index in range(count)]


def typical_layer(vertical: Sequence[Sequence[int]], slash: Sequence[Sequence[int]]) -> int:
    """Find the layer whose budgets together are nearest to the mean of all layers."""
    sums = [sum(v) + sum(s) for v, s in zip(vertical, slash, strict=True)]
    mean = statistics.mean(sums)
    return min(range(len(sums)), key=lambda index: abs(sums[index] - mean))
