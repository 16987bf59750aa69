"""Runners of small checkpoints on the CPU, for tests of several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from longspan.attention.sparsity import SparsityPlan, needs_means
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.device.memory import DeviceMemory, plan_memory
from longspan.engine.device.runner import Runner
from longspan.engine.device.stage import ALONE, StagePlace
from longspan.engine.resolve import resolve_positions

BLOCK, CHUNK, LENGTH, PIECE_ROWS = 16, 256, 1024, 64


def load_runner(
    path: Path, plan: SparsityPlan | None, num_blocks: int, place: StagePlace = ALONE,
    **options: Any,
) -> Runner:
    """Load one whose sparse chunks have pieces of PIECE_ROWS rows."""
    config = EngineConfig(
        model=str(path), device="cpu", dtype="float32", prefill_chunk_len=CHUNK,
        block_size=BLOCK, max_model_len=LENGTH, max_num_requests=8, num_threads=1,
        **options)
    model = ModelConfig.from_dir(path)
    memory = plan_memory(model, config, max_step_tokens=2 * CHUNK, means=needs_means(plan),
                         device=DeviceMemory(total_bytes=2**33, free_bytes=2**33))
    runner = Runner.load(path, model, config, replace(memory, num_blocks=num_blocks), plan=plan,
                         dca=resolve_positions("auto", model), place=place)
    runner._chunk._rows = PIECE_ROWS
    return runner
