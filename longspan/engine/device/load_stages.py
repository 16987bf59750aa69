"""From a checkpoint to pipeline stages: weights and KV caches of slices of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longspan.attention.rope import build_rotary
from longspan.attention.sparsity import SparsityPlan, needs_means
from longspan.config import DcaConfig, EngineConfig, ModelConfig
from longspan.engine.device.caches import allocate_caches
from longspan.engine.device.host_memory import give_buffers_back, keep_buffers_in_heap
from longspan.engine.device.memory import MemoryPlan
from longspan.engine.device.stage import PipelineStage
from longspan.engine.resolve import resolve_forms
from longspan.model import TORCH_DTYPES, build_model
from longspan.model.tensor_share import WHOLE, ModelPart
from longspan.model.weights import load_weights, random_weights


def load_stages(
    path: Path, model: ModelConfig, config: EngineConfig, memory: MemoryPlan, *,
    dca: DcaConfig | None, plan: SparsityPlan | None, slices: Sequence[range],
    part: ModelPart = WHOLE,
) -> list[PipelineStage]:
    """Load the stages of some slices of the layers; see `Runner.load`."""
    assert config.device is not None and config.dtype is not None
    dtype = TORCH_DTYPES[config.dtype]
    rotary = build_rotary(
        head_dim=model.head_dim, rope_theta=model.rope_theta, device=config.device,
        scaling=model.rope_scaling, max_model_len=memory.max_model_len, dca=dca)
    stages = []
    if config.device == "cpu":
        give_buffers_back()
    for layers in slices:
        stage = build_model(
            model, layers=layers, rotary=rotary, plan=plan, dtype=dtype, device=config.device,
            forms=resolve_forms(config, model), part=part)
        if config.weights == "random":
            random_weights(stage, seed=layers.start)
        else:
            load_weights(stage, path)
        caches = allocate_caches(stage, config, memory, dtype, means=needs_means(plan))
        stages.append(PipelineStage(model=stage, caches=caches))
    if config.device == "cpu":
        keep_buffers_in_heap()  # after the caches, which go back to the system when freed
    return stages
