"""Decides whether ranks that share rows divide the KV cache among themselves, by the memory, and
whether there are heads for all of them.

A cache that each rank holds whole costs prefill nothing; a divided one holds contexts that no rank
could hold alone, for the time in which each layer's keys are collected.
"""

from __future__ import annotations

from dataclasses import replace

from longspan.attention.sparsity import SparsityPlan
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.device.memory import DeviceMemory
from longspan.engine.setup.step_sizes import ChosenSizes, choose_sizes
from longspan.errors import LongspanError

LEAST_PART = {"cpu": 1, "cuda": 16}
"""Tokens of a block that a rank must have for the device's kernels."""


def choose_division(
    model: ModelConfig, config: EngineConfig, *, means: bool, is_sparse: bool,
    device: DeviceMemory, must_fit: bool = True,
) -> ChosenSizes:
    """Choose sizes as `choose_sizes`, with a cache that is divided where that is asked for, or
    where a context of the wanted length does not fit otherwise.

    Raises `NotEnoughMemoryError` as there, and `LongspanError` where the cache cannot be divided as
    asked.
    """
    if config.divides_kv is None and config.context_parallel > 1 and not reason_against(config):
        whole = choose_sizes(model, replace(config, divides_kv=False), means=means,
                             is_sparse=is_sparse, device=device, must_fit=False).memory
        wanted = config.max_model_len or model.max_position_embeddings
        config = replace(config, divides_kv=(
            whole.missing_bytes > 0 or whole.max_model_len < wanted))
    elif config.divides_kv:
        reason = reason_against(config)
        if reason:
            raise LongspanError(f"divides_kv: {reason}; leave it out")
    return choose_sizes(model, config, means=means, is_sparse=is_sparse, device=device,
                        must_fit=must_fit)


def check_selection_share(
    model: ModelConfig, config: EngineConfig, plan: SparsityPlan | None,
) -> None:
    """Raise `LongspanError` where more ranks share rows than there are heads to select for: each
    selects for some of them."""
    heads = model.num_heads // config.tensor_parallel
    if plan is not None and plan.mode == "tile" and config.context_parallel > heads:
        raise LongspanError(
            f"context_parallel {config.context_parallel}: ranks share the selection of sparse "
            f"prefill by heads, and there are {heads}; use {heads} ranks at most, or dense "
            "attention")


def reason_against(config: EngineConfig) -> str:
    """Say why ranks cannot divide the cache; empty: they can."""
    ranks, size = config.context_parallel, config.block_size
    assert config.device is not None
    least = LEAST_PART[config.device.split(":")[0]]
    if ranks == 1:
        return "there is one rank that shares rows, and nothing to divide"
    if config.kv_dtype is not None:
        return f"a KV cache in {config.kv_dtype} is not divided"
    if size % ranks or size // ranks < least:
        return (f"{ranks} ranks cannot share blocks of {size} tokens equally, {least} or more "
                "for each")
    return ""
