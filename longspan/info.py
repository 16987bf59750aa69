"""`longspan info`: what a model and a prompt of some length need here, from config.json alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from longspan.attention.sparsity import SparsityPlan, needs_means
from longspan.config import EngineConfig, ModelConfig
from longspan.console import GIB, percent, show_table
from longspan.engine.blueprint import plan_in_effect
from longspan.engine.memory import MemoryPlan, device_memory, plan_memory, workspace_bytes
from longspan.engine.resolve import (
    may_be_sparse,
    resolve_attention,
    resolve_config,
    resolve_positions,
)
from longspan.engine.runner import resolve_plan
from longspan.engine.scheduler import max_step_tokens
from longspan.errors import LongspanError, NotEnoughMemoryError
from longspan.model.weights import resolve_checkpoint


def run(model: str, length: int | None, options: dict[str, Any]) -> None:
    """Print weights, KV cache and workspace for `length` tokens, what fits and what will run."""
    config = resolve_config(EngineConfig(model=model, **options),
                            has_cuda=torch.cuda.is_available())
    path = resolve_checkpoint(model)
    facts = ModelConfig.from_dir(path)
    length = facts.max_position_embeddings if length is None else length
    if length <= 0:
        raise LongspanError(f"length must be positive, not {length}")
    plan = resolve_plan(path, facts, config)
    rows = [*_model_rows(facts, config), *_memory_rows(facts, config, plan, length),
            *_attention_rows(facts, config, plan, length)]
    show_table(f"{model}, {length:,} tokens", ("", ""), rows)


def position_label(config: EngineConfig, model: ModelConfig) -> str:
    """The position scheme in effect, as result rows name it."""
    dca = resolve_positions(config.positions, model)
    if dca is None:
        return "rope"
    return "dca+yarn" if dca.original_max_position_embeddings else "dca"


def _model_rows(model: ModelConfig, config: EngineConfig) -> list[tuple[str, str]]:
    heads = f"{model.num_heads} heads, {model.num_kv_heads} of keys and values"
    return [
        ("architecture", f"{model.architecture}, {model.num_layers} layers, {heads}"),
        ("parameters", f"{model.num_parameters:,}"),
        ("longest context claimed", f"{model.max_position_embeddings:,} tokens"),
        ("device", f"{config.device}, {config.dtype}"),
    ]


def _memory_rows(
    model: ModelConfig, config: EngineConfig, plan: SparsityPlan | None, length: int
) -> list[tuple[str, str]]:
    has_dca = resolve_positions(config.positions, model) is not None
    plan = plan_in_effect(config, model, plan, has_dca=has_dca)
    memory = _plan(model, config, means=needs_means(plan))
    kv_bytes = length * memory.kv_bytes_per_token
    assert config.prefill_chunk_len is not None
    workspace = workspace_bytes(model, config, min(config.prefill_chunk_len, length))
    needed = memory.weights_bytes + kv_bytes + workspace
    verdict = "yes" if length <= memory.fitting_len else "no"
    longest = min(memory.fitting_len, model.max_position_embeddings)
    return [
        ("weights", _gib(memory.weights_bytes)),
        ("KV cache", f"{_gib(kv_bytes)} ({memory.kv_bytes_per_token:,} bytes a token)"),
        ("workspace", _gib(workspace)),
        ("together", f"{_gib(needed)} of {_gib(memory.budget_bytes)} usable; fits: {verdict}"),
        ("longest prompt here", f"{longest:,} tokens"),
    ]


def _attention_rows(
    model: ModelConfig, config: EngineConfig, plan: SparsityPlan | None, length: int
) -> list[tuple[str, str]]:
    label = position_label(config, model)
    sparse = resolve_attention(
        config.attention, length, threshold=model.sparse_threshold, has_plan=plan is not None,
        has_dca=label != "rope")
    if not sparse:
        mode = "dense"
        if config.attention == "auto" and _may_be_sparse(model, config, plan):
            mode += f" (sparse above {model.sparse_threshold:,} tokens)"
        return [("attention", mode), ("positions", label)]
    budget = plan or SparsityPlan.default(model.num_layers, model.num_heads)
    return [("attention", f"sparse, {budget.mode} selection"), ("positions", label),
            ("density budget", f"{percent(budget_density(budget, length))} of all pairs, about")]


def budget_density(plan: SparsityPlan, length: int) -> float:
    """Share of all causal pairs that the budgets buy in a prompt of this length: a column or a
    diagonal costs at most `length` pairs, and the dense tail sees everything."""
    budgets = [min(v + s, length) for row_v, row_s in zip(plan.vertical, plan.slash, strict=True)
               for v, s in zip(row_v, row_s, strict=True)]
    mean = sum(budgets) / len(budgets)
    tail = min(plan.dense_tail_len, length)
    body = length - tail
    # A query at position p sees min(p, budget) keys.
    sparse_pairs = body * body / 2 if body <= mean else mean * mean / 2 + (body - mean) * mean
    tail_pairs = tail * (body + tail / 2)
    return min(1.0, (sparse_pairs + tail_pairs) / (length * length / 2))


def _plan(model: ModelConfig, config: EngineConfig, *, means: bool) -> MemoryPlan:
    assert config.prefill_chunk_len is not None
    steps = max_step_tokens(config.prefill_chunk_len, config.max_num_requests)
    try:
        return plan_memory(model, config, max_step_tokens=steps, means=means)
    except NotEnoughMemoryError:
        # Not even one block fits: plan with memory enough, then state what there is.
        device = device_memory(config.device or "cpu")
        endless = replace(device, total_bytes=2**60, free_bytes=2**60)
        ideal = plan_memory(model, replace(config, memory_gib=None, max_model_len=None),
                            max_step_tokens=steps, means=means, device=endless)
        return replace(ideal, device=device, budget_bytes=int(0.9 * device.free_bytes),
                       fitting_len=0)


def _may_be_sparse(model: ModelConfig, config: EngineConfig, plan: SparsityPlan | None) -> bool:
    return may_be_sparse(config.attention, has_plan=plan is not None,
                         has_dca=resolve_positions(config.positions, model) is not None)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
