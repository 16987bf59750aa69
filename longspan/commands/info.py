"""`longspan info`: what a model and a prompt of some length need here, from config.json alone."""

from __future__ import annotations

from typing import Any

from longspan.attention.sparsity import SparsityPlan
from longspan.commands.console import percent, show_table
from longspan.config import LONG_CONFIG, EngineConfig, ModelConfig
from longspan.engine.device.memory import MemoryPlan
from longspan.engine.resolve import extend_window, resolve_attention, resolve_positions
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.errors import LongspanError
from longspan.model.weights import resolve_checkpoint
from longspan.units import in_gib


def run(model: str, length: int | None, options: dict[str, Any]) -> None:
    """Print weights, KV cache and workspace for `length` tokens, what fits and what will run: the
    engine's own plan for contexts of that length."""
    if length is None:
        positions = options.get("positions", "auto")
        facts = ModelConfig.from_dir(resolve_checkpoint(model),
                                     wants_dca=positions in ("dca", "dca+yarn"))
        length = extend_window(positions, facts).max_position_embeddings
    if length <= 0:
        raise LongspanError(f"length must be positive, not {length}")
    engine = ResolvedEngine.resolve(
        EngineConfig(model=model, max_model_len=length, **options), must_fit=False)
    rows = [*_model_rows(engine), *_memory_rows(engine.memory, engine.model),
            *_size_rows(engine), *_attention_rows(engine, length)]
    show_table(f"{model}, {length:,} tokens", ("", ""), rows)


def position_label(config: EngineConfig, model: ModelConfig) -> str:
    """Name the position scheme in effect, as result rows do."""
    dca = resolve_positions(config.positions, model)
    if dca is None:
        return "rope"
    return "dca+yarn" if dca.original_max_position_embeddings else "dca"


def _model_rows(engine: ResolvedEngine) -> list[tuple[str, str]]:
    model = engine.model
    heads = f"{model.num_heads} heads, {model.num_kv_heads} of keys and values"
    active = "" if model.experts is None else (
        f", of them {model.num_active_parameters:,} in the layers of one token "
        f"({model.experts.num_chosen} of {model.experts.num_experts} experts)")
    return [
        ("architecture", f"{model.architecture}, {model.num_layers} layers, {heads}"),
        ("parameters", f"{model.num_parameters:,}{active}"),
        ("longest context claimed", f"{model.max_position_embeddings:,} tokens"),
        ("device", f"{engine.config.device}, {engine.config.dtype}"),
    ]


def _memory_rows(memory: MemoryPlan, model: ModelConfig) -> list[tuple[str, str]]:
    verdict = f"no, {in_gib(memory.missing_bytes)} are missing" if memory.missing_bytes else "yes"
    longest = min(memory.fitting_len, model.max_position_embeddings)
    return [
        ("weights", in_gib(memory.weights_bytes)),
        ("KV cache",
         f"{in_gib(memory.context_bytes)} ({memory.kv_bytes_per_token:,} bytes a token)"),
        ("workspace", in_gib(memory.workspace_bytes)),
        ("together", f"{in_gib(memory.needed_bytes)} of {in_gib(memory.budget_bytes)} usable; "
                     f"fits: {verdict}"),
        ("longest prompt here", f"{longest:,} tokens"),
    ]


def _size_rows(engine: ResolvedEngine) -> list[tuple[str, str]]:
    """How a prompt would be cut, and why so."""
    config = engine.config
    rows = [("prefill chunk", f"{config.prefill_chunk_len:,} tokens"),
            ("requests together", f"{config.max_num_requests}")]
    return [*rows, ("because", engine.sizes_reason)] if engine.sizes_reason else rows


def _attention_rows(engine: ResolvedEngine, length: int) -> list[tuple[str, str]]:
    config, model = engine.config, engine.model
    positions = ("positions", position_label(config, model) + _dca_sizes(engine))
    is_sparse = resolve_attention(
        config.attention, length, threshold=engine.sparse_threshold, has_plan=engine.has_plan,
        has_dca=engine.dca is not None)
    if is_sparse:
        assert engine.plan is not None
        density = percent(budget_density(engine.plan, length))
        return [("attention", f"sparse, {engine.plan.mode} selection"), positions,
                ("density budget", f"{density} of all pairs, about")]
    later = f" (sparse above {engine.sparse_threshold:,} tokens)" if engine.plan else ""
    return [("attention", f"dense{later}"), positions]


def _dca_sizes(engine: ResolvedEngine) -> str:
    """Where DCA begins to differ from plain RoPE, and what other config the checkpoint has."""
    if engine.dca is not None:
        return (f" (as plain RoPE up to {engine.dca.dca_chunk_len:,} tokens; chunk_size "
                f"{engine.dca.chunk_size:,}, local_size {engine.dca.local_size:,})")
    if (engine.path / LONG_CONFIG).is_file():
        return f" ({LONG_CONFIG} is read for more than {engine.model.max_position_embeddings:,})"
    return ""


def budget_density(plan: SparsityPlan, length: int) -> float:
    """Share of all causal pairs that the budgets buy in a prompt of this length: a column or a
    diagonal costs at most `length` pairs, and the dense tail sees everything."""
    budgets = [min(plan.budget_share * (v + s), length)
               for row_v, row_s in zip(plan.vertical, plan.slash, strict=True)
               for v, s in zip(row_v, row_s, strict=True)]
    mean = sum(budgets) / len(budgets)
    tail = min(plan.dense_tail_len, length)
    body = length - tail
    # A query at position p sees min(p, budget) keys.
    sparse_pairs = body * body / 2 if body <= mean else mean * mean / 2 + (body - mean) * mean
    tail_pairs = tail * (body + tail / 2)
    return min(1.0, (sparse_pairs + tail_pairs) / (length * length / 2))
