"""What a run costs, before it starts: operations, time and memory of each phase.

Operations of one token (forward and backward, causal): 6 for each weight of the layers and the
head, 7 L H D T for attention in a row of T tokens, whose backward pass is 2.5 times the forward
one. Recomputed activations cost one more forward pass. Memory is an upper estimate; its factors
are fitted to what nano's training and transformers' Qwen2 layers were seen to take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.config import ModelConfig
from longspan.errors import LongspanError, NotEnoughMemoryError
from longspan.train.loss import chunk_len
from longspan.train.phases import Phase, Shape

GIB = 2**30
STATE_BYTES = 16
"""What a parameter takes: fp32 weight, gradient and two moments."""
EAGER = 2.2
"""How much more an uncompiled layer keeps than a compiled one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """How many GPUs compute, and how."""

    num: int = 1
    context_parallel: int = 1
    """Processes that share a row."""
    tflops: float = 400.0
    """What one GPU sustains: 1e12 operations a second."""
    memory_gib: float = 80.0
    """What one GPU has."""

    @property
    def num_row_groups(self) -> int:
        """Groups that the rows of a step are divided over."""
        return self.num // self.context_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseCost:
    """One line of a plan."""

    phase: Phase
    flops: float
    """What the model needs; recomputation is not counted."""
    seconds: float
    memory_gib: float
    """What the fullest GPU needs."""
    recompute: bool
    """Whether activations must be recomputed for that."""


def flops_per_token(model: ModelConfig, length: int, recompute: bool = False) -> float:
    """Return the operations of training on one token of a row."""
    weights = model.num_active_parameters + model.vocab_size * model.hidden_size
    width = model.num_layers * model.num_heads * model.head_dim * length
    return (8 if recompute else 6) * weights + (9 if recompute else 7) * width


def step_flops(model: ModelConfig, shape: Shape) -> float:
    """Return the operations of one step, recomputation not counted."""
    rows, length = shape
    return rows * length * flops_per_token(model, length)


def layer_bytes_per_token(model: ModelConfig) -> float:
    """Return what a compiled layer keeps of a token for its backward pass."""
    heads = model.num_heads * model.head_dim
    return 2 * (4 * model.hidden_size + 4 * heads + 3.5 * model.intermediate_size)


def memory_bytes(
    model: ModelConfig, tokens_at_once: int, processes: Processes, recompute: bool
) -> float:
    """Return what the fullest process needs with so many tokens in one forward pass of its own."""
    is_sharded = processes.num > 1
    state = STATE_BYTES * model.num_parameters / processes.num
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    layer = model.num_active_parameters / model.num_layers
    # Low-precision copies: of everything, or of what is gathered at a time; two layers overlap.
    copies = 2 * (embeddings + 2 * layer) if is_sharded else 2 * model.num_parameters
    logits = 5 * 4 * chunk_len(model.vocab_size) * model.vocab_size
    head = logits + 8 * model.vocab_size * model.hidden_size
    kept = layer_bytes_per_token(model) * (EAGER if is_sharded else 1.0)
    if recompute:
        activations = 2 * model.num_layers * model.hidden_size + 2 * kept
    else:
        activations = (model.num_layers + 1) * kept
    # With context parallelism each layer's keys and values are gathered for all query heads.
    gathered = 8 * model.num_heads * model.head_dim * processes.context_parallel
    gathered = gathered if processes.context_parallel > 1 else 0
    return state + copies + head + tokens_at_once * (activations + gathered)


def plan(
    model: ModelConfig, phases: Sequence[Phase], processes: Processes, rows_together: int = 1
) -> list[PhaseCost]:
    """Return what each phase costs. Raises `NotEnoughMemoryError` where one does not fit."""
    costs = []
    room = processes.memory_gib * GIB
    for phase in phases:
        if phase.tokens_per_step // phase.seq_len % processes.num_row_groups or (
                processes.num % processes.context_parallel):
            raise LongspanError(
                f"phase {phase.name}: {phase.tokens_per_step // phase.seq_len} rows a step cannot "
                f"be divided over {processes.num} GPUs, {processes.context_parallel} to a row: "
                "change their number, or --context-parallel")
        all_rows = phase.tokens_per_step // phase.seq_len // processes.num_row_groups
        own = phase.seq_len // processes.context_parallel
        needed = memory_bytes(model, max(all_rows, rows_together) * own, processes, False)
        recompute = needed > room
        if recompute:
            needed = memory_bytes(model, rows_together * own, processes, True)
        if needed > room:
            raise NotEnoughMemoryError(
                f"phase {phase.name}: rows of {phase.seq_len:,} tokens need {needed / GIB:.1f} GiB "
                f"on each of {processes.num} processes, {processes.memory_gib:.1f} GiB are there: "
                "use more processes, --context-parallel, or shorter rows")
        shapes = phase.schedule()
        flops = sum(step_flops(model, shape) for shape in shapes)
        real = sum(rows * length * flops_per_token(model, length, recompute)
                   for rows, length in shapes)
        costs.append(PhaseCost(
            phase=phase, flops=flops, seconds=real / (processes.num * processes.tflops * 1e12),
            memory_gib=needed / GIB, recompute=recompute))
    return costs
