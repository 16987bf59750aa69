"""The engine that serves, with random weights: a shape's plan and runner, no checkpoint, no
HTTP."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from longspan.bench.shapes import Shape
from longspan.config import EngineConfig, Quantization
from longspan.engine.device.memory import DeviceMemory, device_memory
from longspan.engine.device.runner import Runner
from longspan.engine.device.stage_runner import StageRunner
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.setup.group import group_memory, open_group
from longspan.engine.setup.lead_runner import LeadRunner
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice
from longspan.model.tensor_share import check_share
from longspan.units import DTYPE_BYTES, GIB, default_dtype
from longspan.weight_form import PLAIN_FORMS, WeightForms
from longspan.weight_sizes import routed_bytes, weights_bytes

USABLE_SHARE = 0.97
"""The share of the free memory that an engine takes: a benchmark has the device for itself."""
GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSizes:
    """Sizes of one engine."""

    max_model_len: int
    num_tokens: int
    """KV slots of the pool: no more than the measurement needs."""
    chunk_len: int | None = None
    max_num_requests: int = 1
    memory_gib: float | None = None
    """Default: nearly all that is free."""
    quantization: str | None = None
    """As `EngineConfig.quantization`."""
    places: Mapping[str, Any] = field(default_factory=dict)
    """``kv_host_gib``, ``kv_dir`` and ``kv_disk_gib`` of the engine."""
    ranks: int = 1
    """Ranks that share the rows of prompts; the pool's sizes are each one's."""
    stages: int = 1
    """Ranks that share the layers."""
    heads: int = 1
    """Ranks that share the heads."""
    kv_dtype: str | None = None


class ShapeEngine(NamedTuple):
    """A shape's engine, and what computes its steps."""

    plan: ResolvedEngine
    runner: Runner | StageRunner | LeadRunner


def plan_engine(
    shape: Shape, device: str, sizes: EngineSizes, memory: DeviceMemory | None = None,
) -> ResolvedEngine:
    """Decide what an engine for this shape decides, with a pool of these sizes. Raises
    `NotEnoughMemoryError`.

    Args:
        memory: what every rank has; None: this process's.
    """
    free_memory(device)
    free_gib = USABLE_SHARE * (memory or device_memory(device)).free_bytes / GIB
    needed = ResolvedEngine.of(
        shape.model, EngineConfig(
            model=shape.name, weights="random", device=device, attention="sparse",
            max_model_len=max(sizes.max_model_len, sizes.num_tokens),
            prefill_chunk_len=sizes.chunk_len, max_num_requests=sizes.max_num_requests,
            memory_gib=sizes.memory_gib or free_gib, kv_dtype=sizes.kv_dtype,
            **_shared(sizes),
            quantization=cast(Quantization | None, sizes.quantization), **sizes.places),
        path=Path(shape.name), plan=shape.plan, device=memory)
    num_blocks = -(-sizes.num_tokens // needed.config.block_size)
    return replace(
        needed, config=replace(needed.config, max_model_len=sizes.max_model_len),
        memory=replace(
            needed.memory, max_model_len=sizes.max_model_len, num_blocks=num_blocks))


@contextmanager
def open_engine(shape: Shape, device: str, sizes: EngineSizes) -> Iterator[ShapeEngine]:
    """Open the engine, its KV cache full of random numbers; frees it afterwards."""
    free_memory(device)
    check_share(shape.model, PLAIN_FORMS, sizes.heads)  # before any rank is started
    config, hub = open_group(EngineConfig(
        model=shape.name, weights="random", device=device, **_shared(sizes)))
    try:
        plan = plan_engine(shape, config.device or device, sizes, group_memory(hub))
    except BaseException:
        if hub is not None:
            hub.close()
        raise
    runner = plan.load_runner(hub)
    try:
        for cache in runner.caches:
            for name, part in cache.by_block().items():
                if part.is_floating_point():
                    part.normal_(std=1 / 64 if name.endswith("scale") else 1)
                else:
                    part.random_(-127, 128)
        yield ShapeEngine(plan, runner)
    finally:
        runner.close()


def _shared(sizes: EngineSizes) -> dict[str, Any]:
    return {"context_parallel": sizes.ranks, "pipeline_parallel": sizes.stages,
            "tensor_parallel": sizes.heads}


def precision_key(quantization: str | None, kv_dtype: str | None) -> dict[str, str]:
    """Return what a row's key says of weights and KV cache; nothing where they are as computed."""
    given = {"quantization": quantization, "kv_dtype": kv_dtype}
    return {name: value for name, value in given.items() if value is not None}


def free_memory(device: str) -> None:
    """Give back what earlier engines held; the allocator keeps it otherwise, as if in use."""
    gc.unfreeze()  # `garbage.freeze` was called while the last engine ran: it is garbage by now
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def random_ids(num_tokens: int, vocab_size: int, seed: int) -> array[int]:
    """Draw a prompt of random tokens."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, num_tokens, dtype=np.int32)
    return array("i", ids.tobytes())


def decode_step(engine: ShapeEngine, context_len: int, batch_size: int) -> ScheduledBatch:
    """Schedule the newest token of requests with so long contexts, each in blocks of its own."""
    size, vocab_size = engine.plan.config.block_size, engine.plan.model.vocab_size
    num_blocks = -(-context_len // size)
    return ScheduledBatch(step_id=0, slices=tuple(
        ScheduledSlice(
            request_id=str(index), token_ids=random_ids(1, vocab_size, index), slot=index,
            cached_len=context_len - 1, prompt_len=context_len - 1, sparse=False, sampling=GREEDY,
            block_ids=range(index * num_blocks, (index + 1) * num_blocks))
        for index in range(batch_size)))


def weight_bytes_read(
    shape: Shape, device: str, batch_size: int, forms: WeightForms = PLAIN_FORMS
) -> int:
    """Return the bytes of the weights that decoding a token of each request reads: all but the rows
    of the embedding not asked for and, about, the experts that none of the tokens takes."""
    model = shape.model
    element = DTYPE_BYTES[default_dtype(device)]
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    idle = routed_bytes(model, forms, element) * (1 - model.routed_share(batch_size))
    return weights_bytes(model, forms, element) - element * embedding - round(idle)
