"""Decode steps replayed from CUDA graphs: one launch instead of some hundred.

A graph computes a whole step, from token ids to sampled tokens, for a fixed number of rows over
fixed buffers. Smaller batches are padded with rows that write and read no key. Graphs are captured
when first needed and share one memory pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.metadata import AttentionMetadata, DecodeGroup
from longspan.engine.batch import DeviceBatch
from longspan.ops.sample import SamplingRows, sample
from longspan.ops.types import PagedKV

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Rows of the graphs."""
WARM_UPS = 2
"""Eager runs before a capture: kernels are compiled and libraries set up outside it."""

Forward = Callable[[Tensor, AttentionMetadata], Tensor]
"""Token ids [B] and where they stand, to logits [B, V] fp32."""


class DecodeOutput(NamedTuple):
    """What a step of n rows computed, on the device."""

    token_ids: Tensor
    """[n] int64, its own copy: later steps do not change it."""
    logits: Tensor
    """[n, V] fp32, valid until the next `DecodeGraphs.run`; may be changed in place."""


class DecodeGraphs:
    """Replays decode steps. CUDA only; see `is_possible`.

    Use, in the runner, under ``torch.inference_mode()`` and on one stream::

        graphs = DecodeGraphs(forward, max_blocks=..., device=device)
        if graphs.takes(inputs):              # decode rows only, not too many
            output = graphs.run(inputs)       # returns when the work is queued

    ``inputs.token_ids`` is a device tensor and may hold tokens that earlier queued steps sample
    (`build_batch` puts them there): steps can be run ahead. Rows that need penalties, masks or
    log-probabilities take ``output.logits`` to the sampler and leave ``output.token_ids`` alone.

    Args:
        forward: computes the whole model, all stages; called for capture only.
        max_blocks: widest block table, ceil(max_model_len / P).
    """

    def __init__(
        self, forward: Forward, *, max_blocks: int, device: torch.device | str,
    ) -> None:
        self._forward = forward
        self._buffers = DecodeBuffers(BATCH_SIZES[-1], max_blocks, device)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, DecodeOutput]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def is_possible(cache: PagedKV, num_heads: int) -> bool:
        """Whether all of a decode step is computed by kernels that never wait for the host."""
        if not cache.k.is_cuda:
            return False
        from longspan.ops import decode, pointwise

        return decode.supports(cache, num_heads) and pointwise.supports_store(cache)

    @staticmethod
    def takes(inputs: DeviceBatch) -> bool:
        """Whether a step is all decode, each row of it sampled, and not too large."""
        metadata = inputs.metadata
        return (not metadata.prefills and len(inputs.token_ids) <= BATCH_SIZES[-1]
                and len(inputs.sampling.seed) == len(inputs.token_ids))

    def run(self, inputs: DeviceBatch) -> DecodeOutput:
        """Queue a step. Captures its graph first if there is none, which takes seconds."""
        assert self.takes(inputs)
        count = len(inputs.token_ids)
        size = next(size for size in BATCH_SIZES if size >= count)
        key = (size, inputs.all_greedy)
        if key not in self._graphs:
            self._graphs[key] = self._capture(size, inputs.all_greedy)
        graph, output = self._graphs[key]
        self._buffers.load(inputs, size)
        graph.replay()
        return DecodeOutput(output.token_ids[:count].clone(), output.logits[:count])

    def _capture(self, size: int, all_greedy: bool) -> tuple[torch.cuda.CUDAGraph, DecodeOutput]:
        """Over padding only, so that no request's keys are touched."""
        self._buffers.clear(size)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._step(size, all_greedy)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of a server may use CUDA during the capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self._step(size, all_greedy)
        return graph, output

    def _step(self, size: int, all_greedy: bool) -> DecodeOutput:
        buffers = self._buffers
        logits = self._forward(buffers.token_ids(size), buffers.metadata(size))
        return DecodeOutput(
            sample(logits, buffers.sampling(size), all_greedy=all_greedy), logits)


class DecodeBuffers:
    """The inputs of decode steps at fixed places, for any number of rows up to ``max_rows``."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device | str) -> None:
        self._int_pads = torch.tensor([[0], [0], [-1], [0], [0], [0], [0], [-1]]).to(device)
        self._float_pads = torch.tensor([[1.0], [0.0], [1.0], [0.0]]).to(device)
        self._ints = self._int_pads.repeat(1, max_rows)
        self._floats = self._float_pads.repeat(1, max_rows)
        self._tables = torch.zeros(max_rows, max_blocks, dtype=torch.int64, device=device)

    def load(self, inputs: DeviceBatch, size: int) -> None:
        """Copy a step of n rows to the front of ``size`` rows; the others become padding, which
        has no key (length 0) and writes none (slot -1)."""
        group, rows = inputs.metadata.decode, inputs.sampling
        assert group is not None
        count, filled = len(inputs.token_ids), inputs.metadata.filled_blocks
        self.clear(size)
        self._ints[:7, :count] = torch.stack((
            inputs.token_ids, inputs.metadata.positions, inputs.metadata.slot_mapping,
            group.context_lens, rows.top_k, rows.seed, rows.position))
        self._ints[7, : len(filled)] = filled
        self._floats[:, :count] = torch.stack((
            group.scales, rows.temperature, rows.top_p, rows.min_p))
        self._tables[:count, : group.block_tables.shape[1]] = group.block_tables

    def clear(self, size: int) -> None:
        """Make the first ``size`` rows padding."""
        self._ints[:, :size] = self._int_pads
        self._floats[:, :size] = self._float_pads

    def token_ids(self, size: int) -> Tensor:
        """[size] int64"""
        return self._ints[0, :size]

    def metadata(self, size: int) -> AttentionMetadata:
        """Of ``size`` decode rows, all of them wanted."""
        ints = self._ints[:, :size]
        return AttentionMetadata(
            positions=ints[1], slot_mapping=ints[2], filled_blocks=ints[7], prefills=(),
            decode=DecodeGroup(start=0, block_tables=self._tables[:size], context_lens=ints[3],
                               scales=self._floats[0, :size]))

    def sampling(self, size: int) -> SamplingRows:
        """Parameters of ``size`` rows."""
        ints, floats = self._ints[:, :size], self._floats[:, :size]
        return SamplingRows(temperature=floats[1], top_k=ints[4], top_p=floats[2],
                            min_p=floats[3], seed=ints[5], position=ints[6])
