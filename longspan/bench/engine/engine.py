"""The real engine on random weights: memory plan, runner, scheduler; no checkpoint, no HTTP."""

from __future__ import annotations

import gc
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan import ops
from longspan.attention.layer import allocate_cache
from longspan.attention.sparsity import needs_means
from longspan.bench.session import CheckFailed
from longspan.bench.shapes import Shape
from longspan.bench.timing import swapped
from longspan.config import EngineConfig
from longspan.engine.device import runner as runner_module
from longspan.engine.device.memory import device_memory
from longspan.engine.device.runner import Runner
from longspan.engine.resolve import resolve_config
from longspan.engine.setup.engine_plan import ResolvedEngine, _plan_memory
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice
from longspan.model.qwen2 import CausalLM, Linear
from longspan.model.weights import random_weights
from longspan.ops.types import PagedKV
from longspan.units import DTYPE_BYTES, GIB, default_dtype

USABLE_SHARE = 0.97
"""Of what is free: a benchmark has the device for itself."""
WARMUP_LEN = 4096
"""Queries of a warm-up step: enough for the same kernels, an eighth of a chunk's time."""
GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
LINEAR, SELECTION, ATTENTION = "linear", "selection", "attention"
WATCHED = (
    (Linear, "forward", LINEAR), (Linear, "add_to", LINEAR), (Linear, "part", LINEAR),
    (ops, "select_vertical_slash", SELECTION), (ops, "prefill_attention", ATTENTION),
    (ops, "sparse_prefill_attention", ATTENTION), (ops, "decode_attention", ATTENTION))
"""(owner, attribute, part of the time to first token)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Sizes of one engine."""

    max_model_len: int
    num_tokens: int
    """KV slots of the pool: no more than the measurement needs."""
    chunk_len: int | None = None
    max_num_requests: int = 1
    memory_gib: float | None = None
    """Default: nearly all that is free."""


@dataclass(frozen=True, kw_only=True)
class RandomEngine:
    """A shape with random weights and a KV cache full of random numbers."""

    blueprint: ResolvedEngine
    runner: Runner
    caches: tuple[PagedKV, ...]
    """Of all layers."""


def make_blueprint(shape: Shape, device: str, options: EngineOptions) -> ResolvedEngine:
    """What an engine for this shape decides. Raises `NotEnoughMemoryError`."""
    free_memory(device)
    free_bytes = device_memory(device).free_bytes
    config = resolve_config(EngineConfig(
        model=shape.name, device=device, attention="sparse", max_model_len=options.max_model_len,
        prefill_chunk_len=options.chunk_len, max_num_requests=options.max_num_requests,
        memory_gib=options.memory_gib or USABLE_SHARE * free_bytes / GIB,
    ), has_cuda=torch.cuda.is_available())
    needed = replace(config, max_model_len=max(options.max_model_len, options.num_tokens))
    memory = _plan_memory(needed, shape.model, means=needs_means(shape.plan))
    num_blocks = -(-options.num_tokens // config.block_size)
    return ResolvedEngine(
        path=Path("."), config=config, model=shape.model, dca=shape.model.dca, has_plan=True,
        plan=shape.plan, memory=replace(
            memory, max_model_len=options.max_model_len, num_blocks=num_blocks))


@contextmanager
def open_engine(shape: Shape, device: str, options: EngineOptions) -> Iterator[RandomEngine]:
    """The engine, freed afterwards."""
    blueprint = make_blueprint(shape, device, options)
    caches: list[PagedKV] = []

    def fill_weights(model: CausalLM, path: Path) -> None:
        random_weights(model, seed=0)

    def fill_cache(**sizes: Any) -> PagedKV:
        caches.append(allocate_cache(**sizes))
        for part in caches[-1]:
            if part is not None:
                part.normal_()
        return caches[-1]

    with ExitStack() as stack:
        stack.enter_context(swapped(runner_module, "load_weights", fill_weights))
        stack.enter_context(swapped(runner_module, "allocate_cache", fill_cache))
        runner = blueprint.load_runner()
    try:
        yield RandomEngine(blueprint=blueprint, runner=runner, caches=tuple(caches))
    finally:
        runner.close()
        caches.clear()


def free_memory(device: str) -> None:
    """Give back what earlier engines held; the allocator keeps it otherwise, as if in use."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def random_ids(num_tokens: int, vocab_size: int, seed: int) -> array[int]:
    """A prompt of random tokens."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, num_tokens, dtype=np.int32)
    return array("i", ids.tobytes())


def warm_up(engine: RandomEngine, num_tokens: int, *, sparse: bool) -> None:
    """Compile what a prefill of ``num_tokens`` meets, on short steps of it: the first tokens, the
    first ones behind each DCA border and each power of two, the last ones. The cache holds random
    numbers.

    Raises `CheckFailed` when logits are not finite.
    """
    chunk = engine.blueprint.config.prefill_chunk_len
    assert chunk is not None
    stride = engine.blueprint.dca.dca_chunk_len if engine.blueprint.dca else num_tokens
    last = (num_tokens - 1) // chunk * chunk
    doubled = (chunk << power for power in range(num_tokens.bit_length()))
    starts = {0, last, *(place // chunk * chunk for place in (stride, 2 * stride, *doubled)
                         if place < num_tokens)}
    logits: list[Tensor] = []
    compute = CausalLM.logits

    def keep(model: CausalLM, hidden: Tensor) -> Tensor:
        logits.append(compute(model, hidden))
        return logits[-1]

    with swapped(CausalLM, "logits", keep):
        for step, start in enumerate(sorted(starts)):
            stop = min(start + min(chunk, WARMUP_LEN), num_tokens)
            engine.runner.execute(step_of(engine, step, [(start, stop, num_tokens)], sparse=sparse))
    if not all(part.isfinite().all() for part in logits):
        raise CheckFailed("logits are not finite; not timed")


def step_of(
    engine: RandomEngine, step_id: int, parts: Sequence[tuple[int, int, int]], *, sparse: bool,
) -> ScheduledBatch:
    """One step of random tokens, each request in blocks of its own.

    parts: (cached_len, context_len, prompt_len) of each request; its last token samples.
    """
    size, vocab_size = engine.blueprint.config.block_size, engine.blueprint.model.vocab_size
    slices, first = [], 0
    for index, (start, stop, prompt_len) in enumerate(parts):
        num_blocks = -(-stop // size)
        slices.append(ScheduledSlice(
            request_id=str(index), token_ids=random_ids(stop - start, vocab_size, index),
            cached_len=start, prompt_len=prompt_len, sparse=sparse, sampling=GREEDY, slot=index,
            block_ids=range(first, first + num_blocks)))
        first += num_blocks
    return ScheduledBatch(step_id=step_id, slices=tuple(slices))


def weight_bytes_read(shape: Shape, device: str) -> int:
    """Weights that decoding one token reads: all but the rows of the embedding not asked for."""
    model = shape.model
    element = DTYPE_BYTES[default_dtype(device)]
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return element * (model.num_parameters - embedding)


def check_once(checks: Sequence[Callable[[], float]]) -> None:
    """Raises `CheckFailed` for the first check that fails."""
    for check in checks:
        assert not math.isnan(check())
