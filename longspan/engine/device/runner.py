"""Computes steps: pipeline stages, their KV caches, sampling.

A pipeline stage is a slice of the layers with its own KV cache; block ids mean the same on every
stage. All stages of a process hand hidden states on directly; where each process has one of them,
`longspan.engine.device.stage_runner` connects these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from longspan.attention.layer import Selector
from longspan.attention.metadata import AttentionMetadata
from longspan.attention.observer import AttentionObserver
from longspan.attention.ranks import LEAST_ROWS, RankGroup, RowSharing, row_unit, total
from longspan.attention.recall import RecallSums
from longspan.attention.shared_decode import least_keys
from longspan.attention.sparsity import SparsityPlan
from longspan.config import DcaConfig, EngineConfig, ModelConfig
from longspan.engine.control.chunking import piece_rows
from longspan.engine.control.copy_queue import TierConfig
from longspan.engine.control.stage_plan import equal_split
from longspan.engine.control.transport import LocalTransport, Transport
from longspan.engine.device.batch import (
    DeviceBatch,
    RequestMeter,
    build_batch,
    is_greedy,
    num_outputs,
)
from longspan.engine.device.block_files import BlockFiles
from longspan.engine.device.block_mover import BlockMover
from longspan.engine.device.block_store import BlockStore
from longspan.engine.device.graphs import CudaRecorder, DecodeGraphs, DecodeState
from longspan.engine.device.launched_step import LaunchedStep, Stopwatch
from longspan.engine.device.load_stages import load_stages
from longspan.engine.device.memory import MemoryPlan, head_rows, peak_memory_bytes
from longspan.engine.device.paused_chunk import PausableChunk
from longspan.engine.device.prompt_logprobs import OnLogits, PromptScorer
from longspan.engine.device.sampling import SampledTokens, Sampler
from longspan.engine.device.stage import ALONE, PipelineStage, StageLink, StagePlace
from longspan.engine.device.timeline import Spans, Timeline
from longspan.engine.kv_file import KvFolder
from longspan.engine.step import ScheduledBatch, ScheduledSlice, StepResult
from longspan.engine.text.grammar import Grammars
from longspan.engine.text.tokenizer import Tokenizer
from longspan.model.tensor_share import ModelPart, TensorShare
from longspan.ops.types import PagedKV


class BegunStep(NamedTuple):
    """A step whose layers are computed, as far as this process has them."""

    batch: ScheduledBatch
    inputs: DeviceBatch
    apart: Tensor | None
    """[m, M] hidden states of rows that are computed apart."""
    packed: Tensor | None
    """[n, M] of the slices that are packed together."""


class Runner:
    """Executes scheduled steps one after the other."""

    def __init__(
        self, stages: Sequence[PipelineStage], sampler: Sampler, *, dca: DcaConfig | None,
        device: str, num_slots: int, piece_rows: int, block_size: int,
        link: StageLink | None = None,
    ) -> None:
        self._link = link
        self.sharing: RowSharing | None = None
        """How ranks share rows; None: this one has all."""
        self._heads: RankGroup | None = None
        self._stages, self._sampler = tuple(stages), sampler
        self.prepare = sampler.prepare  # for requests that follow a grammar
        self._block_size = block_size
        self._head_dim, self._dca, self._device = stages[0].caches[0].k.shape[3], dca, device
        self._scorer = PromptScorer(head_rows(stages[-1].model.config.vocab_size))
        self._chunk = PausableChunk(stages, piece_rows, self._scorer, link)
        # Sampled last by each slot's request: the input of steps that run ahead of the host. One
        # more for the padding of decode graphs.
        self._last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self._copies = torch.cuda.Stream(device) if device.startswith("cuda") else None
        self._graphs: DecodeGraphs | None = None
        self._mover: BlockMover | None = None
        self._meters: tuple[RequestMeter, ...] = ()
        self.timeline: Timeline | None = None

    @classmethod
    def load(
        cls, path: Path, model: ModelConfig, config: EngineConfig, memory: MemoryPlan, *,
        dca: DcaConfig | None, plan: SparsityPlan | None, num_stages: int = 1,
        place: StagePlace = ALONE,
    ) -> Runner:
        """Build the stages, fill their weights and allocate their caches.

        Args:
            config: resolved.
            plan: budgets for sparse prefill; None: this engine is always dense.
            num_stages: of this process.
            place: what this process has, where there are several.

        Raises `CheckpointError` when the weights cannot be read.
        """
        assert config.device is not None and config.dtype is not None
        assert config.prefill_chunk_len is not None and config.max_num_requests is not None
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        stages = load_stages(
            path, model, config, memory, dca=dca, plan=plan,
            slices=([place.layers] if place.layers
                    else equal_split(model.num_layers, num_stages)),
            part=ModelPart(
                has_head=place.layers.start == 0 if place.layers else None,
                share=TensorShare.of(place.heads, model, plan) if place.heads else None))
        sampler = Sampler(vocab_size=model.vocab_size, device=config.device,
                          grammars=lambda: Grammars(Tokenizer(path), model.vocab_size))
        runner = cls(
            stages, sampler, dca=dca, device=config.device,
            num_slots=config.max_num_requests,
            piece_rows=piece_rows(config.device.split(":")[0], config.prefill_chunk_len),
            block_size=memory.block_size, link=place.link)
        runner._heads = place.heads
        if place.link is None:
            runner.use_graphs(stages[0].model.config.num_heads, memory.max_model_len)
        return runner

    def use_graphs(self, num_heads: int, max_model_len: int) -> None:
        """Replay decode steps from CUDA graphs, where the device and the kernels can."""
        if DecodeGraphs.is_possible(self._stages[0].caches[0], num_heads):
            state = DecodeState(
                self._last_tokens, max_blocks=-(-max_model_len // self._block_size),
                block_size=self._block_size, head_dim=self._head_dim, dca=self._dca)
            self._graphs = DecodeGraphs(self._decode, state, CudaRecorder())

    def use_group(self, group: RankGroup, plan: SparsityPlan | None) -> None:
        """Share the rows of prefill slices, and the keys of long decodes, with other ranks; of all
        decodes where each rank's cache has a part of every block."""
        cache = self._stages[0].caches[0]
        self.sharing = RowSharing(
            group, row_unit(plan, self._block_size), least_keys(cache),
            LEAST_ROWS[cache.k.device.type], divides_kv=cache.k.shape[1] < self._block_size)
        if self._graphs is not None:
            self._graphs.sharing = self.sharing

    def use_places(self, config: TierConfig, key: bytes, folder: KvFolder | None) -> None:
        """Keep blocks in host memory and on disk, where there are any.

        Args:
            key: what all blocks depend on besides tokens.

        Raises `NotEnoughMemoryError` when the host's memory does not suffice.
        """
        if config.num_slots:
            store = BlockStore(self.caches, config.num_slots)
            assert store.block_bytes == config.block_bytes, "what was planned is what there is"
            self._mover = BlockMover(
                store, None if folder is None else BlockFiles(folder, key, store))

    def transport(self) -> Transport:
        """For a loop in this process."""
        return LocalTransport(self, max_in_flight=2 if self._device.startswith("cuda") else 1)

    @property
    def caches(self) -> list[PagedKV]:
        """Keys and values of all layers in order."""
        return [cache for stage in self._stages for cache in stage.caches]

    def observe(self, observer: AttentionObserver | None) -> None:
        """Tell ``observer`` what attention does in every prefill; None: nobody."""
        for stage in self._stages:
            stage.model.observe_attention(observer)

    def select_by(self, selector: Selector | None) -> None:
        """Let ``selector`` choose what sparse prefill keeps; None: the product's selection."""
        for stage in self._stages:
            stage.model.select_by(selector)

    def watch_logits(self, on_logits: OnLogits | None) -> None:
        """Show ``on_logits`` the logits of every prompt token that is scored; None: nobody."""
        self._scorer.on_logits = on_logits

    def record_graphs(self) -> None:
        """Record all decode graphs now, where there are any: a server has no time for it later."""
        if self._graphs is not None:
            with torch.inference_mode():
                self._graphs.record_all(len(self._last_tokens) - 1)

    def compile_ahead(self, steps: Iterable[ScheduledBatch]) -> None:
        """Compute steps for what they compile, before any request has KV blocks."""
        self.clear_caches()
        for step in steps:
            self.execute(step)
        self._take_attention_pairs()

    def clear_caches(self) -> None:
        """Zero keys and values: what memory held may be NaN."""
        for part in (part for cache in self.caches for part in cache.by_block().values()):
            part.zero_()

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute a step and wait for its result."""
        return self.launch(batch).wait()

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Compute a step: write its keys and values, sample where a slice asks for it.

        On a GPU it returns when the work is queued behind earlier steps; slices that run ahead take
        their input from those on the device. One thread only.
        """
        with torch.inference_mode():
            graphs = self._graphs_for(batch)
            if graphs is not None:
                graphs.prepare(batch.slices)  # not measured: the device may be waiting for the work
            watch = Stopwatch(self._device)
            sampled = None
            if batch.slices:
                sampled = self._compute(batch) if graphs is None else self._replay(graphs, batch)
            # not after each step: to add them up takes a launch for each layer
            pairs, recalls = self.observed(
                counts_pairs=sampled is not None and batch.prefills)
        step = LaunchedStep(batch, sampled, pairs, watch, self._copies, recalls, self._mover)
        if self.timeline is not None:
            self.timeline.note(watch)
        if self._mover is not None:
            with torch.inference_mode():
                self._mover.start(batch.transfers, batch.seen, watch.begun)
        return step

    def forward(self, inputs: DeviceBatch, apart: Tensor | None = None) -> Tensor | None:
        """All stages in turn. Returns [n, V] fp32 logits of the rows that sample, None without.

        Args:
            apart: [m, M] hidden states of rows that were computed apart; they come first.
        """
        return self._logits(inputs, apart, self._packed(inputs))

    def begin(self, batch: ScheduledBatch) -> BegunStep:
        """Compute the layers that this process has, in inference mode."""
        apart = self._advance(batch)
        inputs = self._build(batch)
        self._meters = inputs.meters + self._chunk.take_meters()
        return BegunStep(batch, inputs, apart, self._packed(inputs))

    def finish(self, step: BegunStep) -> SampledTokens | None:
        """Sample from what the last layer gave, in inference mode."""
        apart = step.apart
        if apart is not None and self._link is not None:
            item = next(item for item in step.batch.slices if item.pieces is not None)
            apart = apart if item.scored is None else self._chunk.score(item, apart)
        return self._sample(step.batch, step.inputs, self._logits(step.inputs, apart, step.packed))

    def observed(
        self, *, counts_pairs: bool,
    ) -> tuple[tuple[Tensor | float, float], list[tuple[str, RecallSums]]]:
        """Return attention pairs, if they are wanted, and the recall of the chunks that are
        complete."""
        pairs = self._take_attention_pairs() if counts_pairs else (0.0, 0.0)
        return pairs, self._take_recalls()

    def trace(self) -> None:
        """Note from now on when each step is computed."""
        self.timeline = Timeline(self._device)

    def traced(self) -> Spans:
        """Return when steps were computed since `trace`, and note no more."""
        assert self.timeline is not None
        found, self.timeline = self.timeline.read(), None
        return found

    def stopwatch(self) -> Stopwatch:
        """Start a stopwatch of this runner's device."""
        return Stopwatch(self._device)

    def _packed(self, inputs: DeviceBatch) -> Tensor | None:
        """Compute the slices that are packed together; None: there are none."""
        num_tokens = inputs.token_ids.shape[0]
        if not num_tokens:
            return None
        rows = inputs.token_ids
        if self._link is not None and self._link.index:
            rows = self._link.receive(num_tokens)
        return self._hidden(rows, inputs.metadata)

    def _logits(
        self, inputs: DeviceBatch, apart: Tensor | None, packed: Tensor | None,
    ) -> Tensor | None:
        """Score what is wanted of the packed rows, and make the logits [n, V] fp32 of all rows that
        sample; None: there are none."""
        rows = [] if apart is None else [apart]
        if packed is not None:
            rows.append(self._score(inputs.scored, packed) if inputs.scored else packed)
        sampled = torch.cat(rows) if len(rows) > 1 else rows[0] if rows else None
        if sampled is None or not sampled.shape[0]:
            return None
        return self._head(sampled)

    def _head(self, hidden: Tensor) -> Tensor:
        return self._stages[0 if self._link else -1].model.logits(hidden)

    def _build(self, batch: ScheduledBatch) -> DeviceBatch:
        return build_batch(
            batch, block_size=self._block_size, head_dim=self._head_dim, dca=self._dca,
            device=self._device, last_tokens=self._last_tokens, sharing=self.sharing)

    def _advance(self, batch: ScheduledBatch) -> Tensor | None:
        """Compute the pieces of a sparse chunk, if the step has any."""
        item = next((item for item in batch.slices if item.pieces is not None), None)
        if item is None:
            return None
        return self._chunk.advance(
            item, lambda: self._build(replace(batch, slices=(replace(item, pieces=None),))))

    def peak_memory_bytes(self) -> int:
        """Highest use so far: of the process on CPUs, of torch's allocator on GPUs."""
        return peak_memory_bytes(self._device)

    def close(self) -> None:
        """Free weights and caches."""
        if self._mover is not None:
            self._mover.close()
        self._stages, self._graphs, self._mover = (), None, None
        self._chunk = PausableChunk((), 1, self._scorer)
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _graphs_for(self, batch: ScheduledBatch) -> DecodeGraphs | None:
        has_graph = self._graphs is not None and batch.slices and self._graphs.takes(batch)
        return self._graphs if has_graph else None

    def _compute(self, batch: ScheduledBatch) -> SampledTokens | None:
        """Compute any step, kernel by kernel."""
        if batch.repeats == 1:
            return self._compute_once(batch)
        parts = [self._compute_once(part) for part in batch.each()]
        return SampledTokens(torch.cat([part.token_ids for part in parts if part]), None)

    def _compute_once(self, batch: ScheduledBatch) -> SampledTokens | None:
        return self.finish(self.begin(batch))

    def _sample(
        self, batch: ScheduledBatch, inputs: DeviceBatch, logits: Tensor | None,
    ) -> SampledTokens | None:
        scored = self._scorer.take()
        if logits is None:
            return SampledTokens(inputs.slots, None, scored=scored) if scored else None
        items = [item for item in batch.slices if item.sampling is not None]
        sampled = self._agreed(self._sampler.sample(
            logits, items, inputs.sampling, all_greedy=inputs.all_greedy))
        self._last_tokens[inputs.slots] = sampled.token_ids.clamp_min(0)  # an index it must be
        return sampled._replace(scored=scored) if scored else sampled

    def _agreed(self, sampled: SampledTokens) -> SampledTokens:
        """Take the first rank's tokens, where ranks share rows; see `longspan.attention.ranks`."""
        if self.sharing is None:
            return sampled
        return sampled._replace(token_ids=self.sharing.group.of_first(sampled.token_ids))

    def _score(self, items: Sequence[ScheduledSlice], hidden: Tensor) -> Tensor:
        """Take the log-probabilities of prompts from the wanted rows, [n, M]. Returns those that
        sample."""
        rows = list[Tensor]()
        parts = hidden.split([num_outputs(item) for item in items])
        for item, part in zip(items, parts, strict=True):
            if item.scored is not None:
                self._scorer.score(self._head, item, part, item.context_len - len(part))
                part = part[len(part) - (item.sampling is not None):]
            rows.append(part)
        return torch.cat(rows)

    def _replay(self, graphs: DecodeGraphs, batch: ScheduledBatch) -> SampledTokens:
        """Replay the decode step that the graphs are prepared for, and those that follow it."""
        count = len(batch.slices)
        if not self._sampler.asks(batch.slices):
            steps = [graphs.run().token_ids[:count].clone() for _ in range(batch.repeats)]
            return SampledTokens(torch.cat(steps) if len(steps) > 1 else steps[0], None)
        assert batch.repeats == 1, "these are sampled one step at a time"
        output = graphs.run().head(count)
        sampled = self._agreed(self._sampler.sample(
            output.logits, batch.slices, output.rows, all_greedy=is_greedy(batch.slices)))
        self._last_tokens[output.slots] = sampled.token_ids.clamp_min(0)
        return sampled

    def _hidden(self, rows: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Token ids [T], or hidden states [T, M] behind a pipeline's first rank, to the hidden
        states of the wanted rows, [n, M], or of all before its last rank."""
        hidden = rows
        for stage in self._stages:
            hidden = stage.model(hidden, metadata, stage.caches)
        return hidden

    def _decode(self, token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Compute what a decode graph records: token ids [B] to logits [B, V] fp32."""
        return self._stages[-1].model.logits(self._hidden(token_ids, metadata))

    def _take_attention_pairs(self) -> tuple[Tensor | float, float]:
        """Return the pairs since the last call, kept ones where counted, without a wait."""
        pairs = [stage.model.attention_pairs() for stage in self._stages]
        for stage in self._stages:
            stage.model.reset_attention_stats()
        kept = sum((kept for kept, _ in pairs), 0.0)
        if self.sharing is not None:
            kept = total(self.sharing.group, kept, self._device)
        causal = sum(causal for _, causal in pairs)
        if self._heads is not None:
            kept, causal = total(self._heads, kept, self._device), causal * self._heads.size
        return kept, causal

    def _take_recalls(self) -> list[tuple[str, RecallSums]]:
        """Return the recall of the sparse chunks that are complete since the last call."""
        meters, self._meters = self._meters, ()
        found = [(request_id, meter.read()) for request_id, meter in meters]
        return [(request_id, recall) for request_id, recall in found if recall is not None]
