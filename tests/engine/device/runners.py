"""Runners of small checkpoints on the CPU, for tests of several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan import ops
from longspan.attention.sparsity import SparsityPlan, needs_means
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.device.memory import DeviceMemory, plan_memory
from longspan.engine.device.runner import Runner
from longspan.engine.device.stage import ALONE, StagePlace
from longspan.engine.resolve import resolve_positions
from longspan.ops import reference
from longspan.ops.select import eager
from longspan.ops.types import QueryRotary

BLOCK, CHUNK, LENGTH, PIECE_ROWS = 16, 256, 1024, 64
RELEASED: list[Any] = [
    pytest.param({"chunk_size": chunk, "local_size": local,
                  "original_max_position_embeddings": chunk}, id=str(chunk - local))
    for chunk, local in ((262_144, 8_192), (131_072, 4_096))]
"""DCA settings of million-token checkpoints, by their stride."""


def load_runner(
    path: Path, plan: SparsityPlan | None, num_blocks: int, place: StagePlace = ALONE, *,
    max_model_len: int = LENGTH, **options: Any,
) -> Runner:
    """Load one whose sparse chunks have pieces of PIECE_ROWS rows."""
    config = EngineConfig(
        model=str(path), device="cpu", dtype="float32", prefill_chunk_len=CHUNK,
        block_size=BLOCK, max_model_len=max_model_len, max_num_requests=8, num_threads=1,
        **options)
    model = ModelConfig.from_dir(path)
    memory = plan_memory(model, config, max_step_tokens=2 * CHUNK, means=needs_means(plan),
                         device=DeviceMemory(total_bytes=2**33, free_bytes=2**33))
    runner = Runner.load(path, model, config, replace(memory, num_blocks=num_blocks), plan=plan,
                         dca=resolve_positions("auto", model), place=place)
    runner._chunk._rows = PIECE_ROWS
    return runner


def compute_by_the_specification(monkeypatch: pytest.MonkeyPatch, dca: dict[str, Any]) -> None:
    """Have the layers of all runners rotate, select and attend by the specification, with the
    stride and the clamp that ``dca`` has, whatever the runner has made of it."""
    def specified(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return op(*(arg._replace(
                stride=dca["chunk_size"] - dca["local_size"], clamp=dca["chunk_size"])
                if isinstance(arg, QueryRotary) else arg for arg in args))

        return call

    for name, op in (
            ("store_kv", reference.store_kv), ("prefill_attention", reference.prefill_attention),
            ("decode_attention", reference.decode_attention),
            ("select_vertical_slash", eager.select_vertical_slash),
            ("sparse_prefill_attention", reference.sparse_prefill_attention)):
        monkeypatch.setattr(ops, name, specified(op))


def fill_history(runner: Runner, blocks: list[int]) -> None:
    """Random keys and values, and their means, in these blocks; NaN in all others."""
    generator = torch.Generator().manual_seed(0)
    for cache in runner.caches:
        for rows, mean in ((cache.k, cache.k_mean), (cache.v, cache.v_mean)):
            rows.fill_(math.nan)
            rows[blocks] = torch.randn(len(blocks), *rows.shape[1:], generator=generator)
            if mean is not None:
                mean.copy_(rows.mean(1))
