"""Costs of a model's work before any is measured: operations over a nominal speed.

Only the proportions matter: the first steps set the speed (`longspan.engine.control.latency`). The
nominal speeds are low, so that the first slices are too short rather than too long.
"""

from __future__ import annotations

from longspan.attention.sparsity import SparsityPlan
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.control.chunking import tail_start
from longspan.engine.control.ladder import Ladder
from longspan.engine.control.latency import SELECTION_ROWS, Costs
from longspan.engine.device.memory import kv_block_bytes
from longspan.engine.resolve import resolve_forms
from longspan.units import DTYPE_BYTES
from longspan.weight_sizes import routed_bytes, weights_bytes

FLOPS = {"cpu": 5e10, "cuda": 1e14}
"""Operations per second."""
BYTES_PER_S = {"cpu": 2e9, "cuda": 1e12}
"""Weights and cache read in decode; the CPU's attention of one row is slow."""
STEP_S = {"cpu": 2e-3, "cuda": 2e-3}
BORDER_STEP = 1_024
MARGIN = 1.25
"""A sparse prefill has to be shorter by this, to be chosen: it is an approximation."""


def prior_costs(model: ModelConfig, config: EngineConfig, plan: SparsityPlan | None) -> Costs:
    """Return the costs of a resolved configuration. ``plan``: None: every prefill is dense."""
    assert config.device is not None and config.dtype is not None
    assert config.prefill_chunk_len is not None
    device, step_s = config.device.split(":")[0], STEP_S[config.device.split(":")[0]]
    element = DTYPE_BYTES[config.dtype]
    linear = 2 * model.num_active_parameters
    pair = 4 * model.num_layers * model.num_heads * model.head_dim
    dense = (step_s, linear / FLOPS[device], pair / 2 / FLOPS[device])
    kept = mean = 0.0
    if plan is not None:
        budgets = [value for rows in (plan.vertical, plan.slash) for row in rows for value in row]
        kept = 2 * plan.budget_share * sum(budgets) / len(budgets) + config.block_size
        # The selection is SELECTION_ROWS of means, but for scouts: scores of some rows alone.
        mean = 1 / config.block_size + plan.num_scouts / config.prefill_chunk_len / 2
    history_s = pair * mean / FLOPS[device]
    sparse = (step_s, (linear + pair * kept) / FLOPS[device], history_s, SELECTION_ROWS * history_s)
    # every token of a step may read experts of its own
    forms = resolve_forms(config, model)
    experts_s = routed_bytes(model, forms, element) / BYTES_PER_S[device]
    weights_s = weights_bytes(model, forms, element) / BYTES_PER_S[device] - experts_s
    decode = (step_s + weights_s, linear / FLOPS[device] + experts_s * model.routed_share(1),
              kv_block_bytes(model, config, means=False) / config.block_size / BYTES_PER_S[device])
    return Costs(dense=dense, sparse=sparse, decode=decode)


def sparse_border(
    costs: Costs, threshold: int, *, tail_len: int, block_size: int, prefill_chunk_len: int,
) -> int:
    """Return the longest prompt that is better computed densely, tokens: ``threshold`` at most, and
    half of it at least, for budgets are meant for long prompts."""
    for length in range(threshold // 2, threshold, BORDER_STEP):
        dense_s, sparse_s = (
            costs.prefill_s(0, length + 1, tail=tail, ladder=Ladder(longest=prefill_chunk_len))
            for tail in (None, tail_start(length + 1, tail_len, block_size)))
        if MARGIN * sparse_s < dense_s:
            return length
    return threshold
