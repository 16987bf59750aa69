"""Decode steps replayed from CUDA graphs: one launch instead of some hundred.

A graph computes a whole step, from the tokens that were sampled last to the next ones, for a fixed
number of rows over fixed buffers, and moves those buffers on: while the same requests decode, a
step is one replay, and nothing is uploaded. Smaller batches are padded with rows that write and
read no key. Graphs share one memory pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.attention.metadata import AttentionMetadata, decode_metadata
from longspan.attention.ranks import RowSharing
from longspan.attention.upload import upload
from longspan.config import DcaConfig
from longspan.engine.device.batch import is_greedy
from longspan.engine.step import ScheduledBatch, ScheduledSlice
from longspan.ops.sampling.sample import SamplingRows, sample
from longspan.ops.types import PagedKV

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Rows of the graphs."""
WARM_UPS = 2
"""Eager runs before a capture: kernels are compiled and libraries set up outside it."""

Forward = Callable[[Tensor, AttentionMetadata], Tensor]
"""Token ids [B] and where they stand, to logits [B, V] fp32."""


def recorded_sizes(max_rows: int) -> tuple[int, ...]:
    """Rows of the graphs that steps of up to ``max_rows`` rows need."""
    return tuple(size for size in BATCH_SIZES if size < 2 * max_rows)


class DecodeOutput(NamedTuple):
    """Results of a step of n rows, padding included, on the device; valid until the next one."""

    token_ids: Tensor
    """[n] int64"""
    logits: Tensor
    """[n, V] fp32; may be changed in place."""
    rows: SamplingRows
    """Parameters by which the tokens were sampled."""
    slots: Tensor
    """[n] int64, of the requests."""

    def head(self, count: int) -> DecodeOutput:
        """Return the first ``count`` rows, without padding."""
        return DecodeOutput(
            self.token_ids[:count], self.logits[:count],
            SamplingRows(*(part[:count] for part in self.rows)), self.slots[:count])


Compute = Callable[[], DecodeOutput]
Record = Callable[[Compute], Compute]
"""Turns a step that is launched kernel by kernel into one that is replayed."""


class DecodeGraphs:
    """Replays decode steps. See `is_possible`.

    Use, in the runner, under ``torch.inference_mode()`` and on one stream::

        graphs = DecodeGraphs(forward, DecodeState(last_tokens, ...), CudaRecorder())
        if graphs.takes(batch):              # decodes only, not too many
            graphs.prepare(batch.slices)     # most often there is nothing to do
            output = graphs.run()            # returns when the work is queued

    Input tokens are those of ``last_tokens`` unless a slice brings its own, and sampled ones go
    there: steps can be run ahead of the host. Rows that need penalties, masks or log-probabilities
    take ``output.logits`` to the sampler, whose tokens replace the graph's in ``last_tokens``.

    Args:
        forward: computes the whole model, all stages; called to record only.
        record: `CudaRecorder`; on CPUs, where tests run, what returns the step as it is.
    """

    def __init__(self, forward: Forward, state: DecodeState, record: Record) -> None:
        self._forward, self._state, self._record = forward, state, record
        self.sharing: RowSharing | None = None
        """How ranks share the keys of steps that see many; None: there is one rank."""
        self._graphs: dict[tuple[int, bool, bool], Compute] = {}
        self._replay: Compute | None = None
        """The graph of the latest step."""
        self._rows: list[tuple[str, int, int]] = []
        """Id, slot and cached_len of each request in the step that was loaded last."""
        self._num_steps = 0
        """Number of steps that the buffers have moved on since that load."""

    @staticmethod
    def is_possible(cache: PagedKV, num_heads: int) -> bool:
        """Return whether kernels that never wait for the host can compute a whole decode step."""
        if not cache.k.is_cuda:
            return False
        from longspan.ops import decode, pointwise

        return decode.supports(cache, num_heads) and pointwise.supports_store(cache)

    @staticmethod
    def takes(batch: ScheduledBatch) -> bool:
        """Return whether a step is all decode, each row of it sampled, and not too large."""
        return (0 < len(batch.slices) <= BATCH_SIZES[-1] and not batch.prefills
                and all(item.sampling is not None for item in batch.slices))

    def record_all(self, max_rows: int) -> None:
        """Record every graph that steps of up to ``max_rows`` rows need, so that none is recorded
        later, which takes seconds. The largest first: the others find their memory in its."""
        for size in reversed(recorded_sizes(max_rows)):
            for all_greedy in (False, True):
                for is_shared in self._kinds():
                    self._graph(size, all_greedy, is_shared)

    @property
    def num_graphs(self) -> int:
        """Graphs that are recorded."""
        return len(self._graphs)

    def prepare(self, items: Sequence[ScheduledSlice]) -> None:
        """Bring the buffers to where these slices stand, unless they are there. Records the step's
        graph if there is none."""
        rows = [(item.request_id, item.slot, item.cached_len - self._num_steps) for item in items]
        if rows != self._rows:
            self._load(items)
        self._state.feed(items)

    def run(self) -> DecodeOutput:
        """Queue the step that was prepared; the result includes padding rows."""
        assert self._replay is not None
        self._num_steps += 1
        return self._replay()

    def _kinds(self) -> tuple[bool, ...]:
        """List whether keys are shared, for the steps that there are."""
        if self.sharing is None:
            return (False,)
        return (True,) if self.sharing.divides_kv else (False, True)

    def _load(self, items: Sequence[ScheduledSlice]) -> None:
        """Upload the rows from the host: the requests or their positions are unexpected."""
        size = next(size for size in BATCH_SIZES if size >= len(items))
        num_keys = sum(item.context_len for item in items)
        is_shared = self.sharing is not None and (
            self.sharing.divides_kv or num_keys >= self.sharing.least_keys)
        self._replay = self._graph(size, is_greedy(items), is_shared)
        self._state.load(items, size)
        self._rows = [(item.request_id, item.slot, item.cached_len) for item in items]
        self._num_steps = 0

    def _graph(self, size: int, all_greedy: bool, is_shared: bool) -> Compute:
        """Return the graph of this size, recorded over padding so that no request's keys change."""
        key = size, all_greedy, is_shared
        if key not in self._graphs:
            self._rows = []
            self._state.clear(size)
            self._graphs[key] = self._record(
                lambda: self._step(size, all_greedy, self.sharing if is_shared else None))
        return self._graphs[key]

    def _step(self, size: int, all_greedy: bool, sharing: RowSharing | None) -> DecodeOutput:
        state = self._state
        rows = state.sampling(size)
        logits = self._forward(state.token_ids(size), state.metadata(size, sharing))
        token_ids = sample(logits, rows, all_greedy=all_greedy)
        if self.sharing is not None:
            token_ids = self.sharing.group.of_first(token_ids)
        state.advance(size, token_ids)
        return DecodeOutput(token_ids, logits, rows, state.slots(size))


class CudaRecorder:
    """Records CUDA graphs in one memory pool; see `Record`."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Compute) -> Compute:
        """Run it a few times, then capture it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of a server may use CUDA during the capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()

        def replay() -> DecodeOutput:
            graph.replay()
            return output

        return replay


class DecodeState:
    """Where the rows of decode steps stand, at fixed places on the device. A step derives
    everything that it reads from these numbers, and `advance` makes them those of the next step.

    Args:
        last_tokens: [num slots + 1] int64, the token that each slot sampled last; the last one
        belongs to no request: padding rows use it.
        max_blocks: widest block table, ceil(max_model_len / P).
    """

    def __init__(
        self, last_tokens: Tensor, *, max_blocks: int, block_size: int, head_dim: int,
        dca: DcaConfig | None,
    ) -> None:
        self._last_tokens, self._device = last_tokens, last_tokens.device
        self._block_size, self._head_dim, self._dca = block_size, head_dim, dca
        nobody = len(last_tokens) - 1
        self._int_pads = torch.tensor([[nobody], [0], [0], [0], [0]], device=self._device)
        self._float_pads = torch.tensor([[0.0], [1.0], [0.0]], device=self._device)
        max_rows = BATCH_SIZES[-1]
        self._ints = self._int_pads.repeat(1, max_rows)
        self._floats = self._float_pads.repeat(1, max_rows)
        self._tables = torch.zeros(max_rows, max_blocks, dtype=torch.int64, device=self._device)

    def load(self, items: Sequence[ScheduledSlice], size: int) -> None:
        """Put decode slices to the front of ``size`` rows; the others become padding. Tables are
        whole: later steps write into later blocks."""
        self.clear(size)
        ints, floats, tables = upload(_as_tensors(items), self._device)
        self._ints[:, : len(items)] = ints
        self._floats[:, : len(items)] = floats
        self._tables[: len(items), : tables.shape[1]] = tables

    def clear(self, size: int) -> None:
        """Make the first ``size`` rows padding, which has no key (length 0) and writes none."""
        self._ints[:, :size] = self._int_pads
        self._floats[:, :size] = self._float_pads

    def feed(self, items: Sequence[ScheduledSlice]) -> None:
        """Use the tokens that slices bring as input, whatever their slots sampled last."""
        known = [(item.slot, item.token_ids[0]) for item in items if item.token_ids]
        if known:
            slots, tokens = upload(torch.tensor(known), self._device).unbind(1)
            self._last_tokens[slots] = tokens

    def advance(self, size: int, token_ids: Tensor) -> None:
        """Move on by one token after a step has sampled ``token_ids`` [size]. A row that could not
        be sampled reads token 0, and its result is discarded."""
        self._last_tokens[self.slots(size)] = token_ids.clamp_min(0)
        lens = self._ints[1, :size]
        lens += lens > 0

    def slots(self, size: int) -> Tensor:
        """Places in ``last_tokens``, [size] int64."""
        return self._ints[0, :size]

    def token_ids(self, size: int) -> Tensor:
        """Token ids that are the step's input, [size] int64."""
        return self._last_tokens[self.slots(size)]

    def metadata(self, size: int, sharing: RowSharing | None = None) -> AttentionMetadata:
        """Metadata of ``size`` decode rows, all of which are sampled."""
        return decode_metadata(
            self._tables[:size], self._ints[1, :size], self._ints[2, :size],
            block_size=self._block_size, head_dim=self._head_dim, dca=self._dca, sharing=sharing)

    def sampling(self, size: int) -> SamplingRows:
        """Parameters of ``size`` rows; they stay those of this step when the lengths advance."""
        ints, floats = self._ints[:, :size], self._floats[:, :size]
        return SamplingRows(temperature=floats[0], top_k=ints[3], top_p=floats[1],
                            min_p=floats[2], seed=ints[4], position=ints[1].clone())


def _as_tensors(items: Sequence[ScheduledSlice]) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of `DecodeState` on the host: [5, n] int64, [3, n] fp32, [n, max blocks] int32."""
    ints, floats = list[tuple[int, ...]](), list[tuple[float, ...]]()
    tables = np.zeros((len(items), max(len(item.block_ids) for item in items)), dtype=np.int32)
    for table, item in zip(tables, items, strict=True):
        sampling = item.sampling
        assert sampling is not None
        ints.append((item.slot, item.context_len, item.prompt_len, sampling.top_k, sampling.seed))
        floats.append((sampling.temperature, sampling.top_p, sampling.min_p))
        table[: len(item.block_ids)] = item.block_ids
    return (torch.tensor(ints, dtype=torch.int64).T, torch.tensor(floats, dtype=torch.float32).T,
            torch.from_numpy(tables))
