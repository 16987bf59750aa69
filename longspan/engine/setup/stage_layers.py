"""Which layers the stages of a pipeline have, by counted operations."""

from __future__ import annotations

from dataclasses import replace

from longspan.attention.sparsity import SparsityPlan
from longspan.config import ModelConfig
from longspan.engine.control.stage_plan import split_by_time
from longspan.errors import LongspanError

SPLIT_LEN = 524_288
"""Stages take equal times for a prompt of this length, tokens."""
SPARSE_SLOWER = 1.35
"""Time of an operation of sparse attention against one of a product: rows of an H200."""


def stage_layers(
    model: ModelConfig, plan: SparsityPlan | None, num_stages: int,
) -> list[range]:
    """Split the layers so that a long prompt takes the same time in all stages: layers have other
    budgets, and the last one computes keys and values alone.

    Raises `LongspanError` for more stages than layers.
    """
    if num_stages > model.num_layers:
        raise LongspanError(f"pipeline_parallel {num_stages}: the model has {model.num_layers} "
                            "layers; use as many ranks at the most")
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    linear = 2 * (model.num_active_parameters - vocabulary) / model.num_layers
    if plan is None:
        keys = [model.num_heads * SPLIT_LEN / 2] * model.num_layers
    else:
        keys = [SPARSE_SLOWER * plan.budget_share * sum(map(sum, heads))
                for heads in zip(plan.vertical, plan.slash, strict=True)]
    times = [linear + 4 * model.head_dim * kept for kept in keys]
    times[-1] = 4 * model.num_kv_heads * model.head_dim * model.hidden_size
    return split_by_time(times, num_stages)


def largest_stage(model: ModelConfig, plan: SparsityPlan | None, num_stages: int) -> ModelConfig:
    """Return the model as its longest stage, for the memory that every rank must have. Head and
    embedding, which the first one has, are counted in."""
    if num_stages == 1:
        return model
    longest = max(map(len, stage_layers(model, plan, num_stages)))
    return replace(model, num_layers=longest, sparse_budgets=None)
