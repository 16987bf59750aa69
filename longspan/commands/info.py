"""`longspan info`: what a model and a prompt of some length need, from config and sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longspan.attention.sparsity import SparsityPlan
from longspan.commands.console import percent, show_table
from longspan.commands.predict import predict_rows
from longspan.config import LONG_CONFIG, EngineConfig, ModelConfig
from longspan.engine.device.memory import DeviceMemory, device_memory
from longspan.engine.resolve import (
    extend_window,
    resolve_attention,
    resolve_config,
    resolve_forms,
    resolve_positions,
)
from longspan.engine.setup.engine_plan import ResolvedEngine, resolve_plan
from longspan.engine.setup.tier_plan import places_bytes
from longspan.errors import LongspanError
from longspan.model.hub import download_size
from longspan.model.weights import is_on_hub, resolve_checkpoint
from longspan.units import GIB, in_gib
from longspan.weight_form import PLAIN


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that is planned for: this one, or one with the memory that was asked for."""

    device: str
    memory: DeviceMemory | None
    """None: what this machine has."""
    note: str
    """How it differs from this machine; empty: it is this one."""


def run(model: str, length: int | None, options: dict[str, Any]) -> None:
    """Print what ``length`` tokens need, what fits and what to change so that it does, what will
    run and how long it may take: the engine's own plan for contexts of that length."""
    path = resolve_checkpoint(model, only_facts=True)
    positions = options.get("positions", "auto")
    wants_dca = positions in ("dca", "dca+yarn")
    if length is None:
        length = extend_window(
            positions, ModelConfig.from_dir(path, wants_dca=wants_dca)).max_position_embeddings
    if length <= 0:
        raise LongspanError(f"length must be positive, not {length}")
    facts = ModelConfig.from_dir(path, wanted_len=length, wants_dca=wants_dca)
    machine = choose_machine(options)
    asked = EngineConfig(model=model, max_model_len=length, **{**options, "device": machine.device})
    engine = plan_engine(asked, facts, path, machine)
    rows = [*_model_rows(engine, machine), *_download_rows(model), *_memory_rows(engine, length),
            *_place_rows(engine), *_remedy_rows(engine, asked, path, machine), *_size_rows(engine),
            *_attention_rows(engine, length), *predict_rows(engine, length, not machine.note)]
    show_table(f"{model}, {length:,} tokens", ("", ""), rows)


def choose_machine(options: dict[str, Any]) -> Machine:
    """Take the memory that is asked for as the machine's, even if this one has less or no GPU."""
    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    gib = options.get("memory_gib")
    if gib is None:
        return Machine(device, None, "")
    wanted = int(gib * GIB)
    if device.startswith("cuda") and not torch.cuda.is_available():
        return Machine(device, DeviceMemory(total_bytes=wanted, free_bytes=wanted),
                       "not this machine, which has no such GPU")
    here = device_memory(device).total_bytes
    if wanted <= here:
        return Machine(device, None, "")
    return Machine(device, DeviceMemory(total_bytes=wanted, free_bytes=wanted),
                   f"not this machine, which has {in_gib(here)}")


def plan_engine(
    asked: EngineConfig, facts: ModelConfig, path: Path, machine: Machine
) -> ResolvedEngine:
    """Decide as an engine on that machine would, whether it fits or not."""
    has_cuda = torch.cuda.is_available() or machine.memory is not None
    config = resolve_config(asked, has_cuda=has_cuda)
    return ResolvedEngine.of(facts, asked, path=path, plan=resolve_plan(path, facts, config),
                             must_fit=False, device=machine.memory)


def position_label(config: EngineConfig, model: ModelConfig) -> str:
    """Name the position scheme in effect, as result rows do."""
    dca = resolve_positions(config.positions, model)
    if dca is None:
        return "rope"
    return "dca+yarn" if dca.original_max_position_embeddings else "dca"


def _model_rows(engine: ResolvedEngine, machine: Machine) -> list[tuple[str, str]]:
    model = engine.model
    heads = f"{model.num_heads} heads, {model.num_kv_heads} of keys and values"
    active = "" if model.experts is None else (
        f", of them {model.num_active_parameters:,} in the layers of one token "
        f"({model.experts.num_chosen} of {model.experts.num_experts} experts)")
    device = f"{engine.config.device}, {engine.config.dtype}"
    ranks = engine.config.ranks_label
    return [
        ("architecture", f"{model.architecture}, {model.num_layers} layers, {heads}"),
        ("parameters", f"{model.num_parameters:,}{active}"),
        ("longest context claimed", f"{model.max_position_embeddings:,} tokens"),
        ("device", f"{device} ({machine.note})" if machine.note else device),
        *[("ranks", ranks)] * bool(ranks),
    ]


def _download_rows(model: str) -> list[tuple[str, str]]:
    if not is_on_hub(model):
        return []
    size = download_size(model)
    if size is None:
        return [("download", "unknown: the hub cannot be asked")]
    cached = f", {size.cached_bytes / 1e9:.2f} GB of them are here" if size.cached_bytes else ""
    return [("download", f"{size.total_bytes / 1e9:.2f} GB{cached}")]


def _memory_rows(engine: ResolvedEngine, length: int) -> list[tuple[str, str]]:
    memory, model = engine.memory, engine.model
    form = resolve_forms(engine.config, model).form
    claim = model.max_position_embeddings
    note = "" if form == PLAIN else f" ({form.label})"
    verdict = ("yes" if length <= claim else f"no, the model reads {claim:,} tokens at the most")
    if memory.missing_bytes:
        verdict = f"no, {in_gib(memory.missing_bytes)} are missing"
    longest = min(memory.fitting_len, claim)
    return [
        ("weights", f"{in_gib(memory.weights_bytes)}{note}"),
        ("KV cache",
         f"{in_gib(memory.context_bytes)} ({memory.kv_bytes_per_token:,} bytes a token"
         f"{'' if engine.config.kv_dtype is None else ', ' + engine.config.kv_dtype})"),
        ("workspace", in_gib(memory.workspace_bytes)),
        ("together", f"{in_gib(memory.needed_bytes)} of {in_gib(memory.budget_bytes)} usable; "
                     f"fits: {verdict}"),
        ("longest prompt here", f"{longest:,} tokens"),
    ]


def _remedy_rows(
    engine: ResolvedEngine, asked: EngineConfig, path: Path, machine: Machine
) -> list[tuple[str, str]]:
    """List what to change so that it fits; each has been planned. Empty: it fits."""
    claim, memory = engine.model.max_position_embeddings, engine.memory
    assert asked.max_model_len is not None
    if asked.max_model_len > claim:
        shorter = replace(asked, max_model_len=claim)
        rows = _remedy_rows(plan_engine(shorter, engine.model, path, machine), shorter, path,
                            machine)
        more = f"; for {claim:,} tokens also {rows[0][1]}" if rows else ""
        return [("so that it fits", f"--length {claim}, or a model that reads more{more}")]
    if not memory.missing_bytes:
        return []
    remedies = []
    if engine.config.dtype != "bfloat16":
        half = plan_engine(replace(asked, dtype="bfloat16"), engine.model, path, machine).memory
        short = f", {in_gib(half.missing_bytes)} still missing" if half.missing_bytes else ""
        remedies.append(f"--dtype bfloat16 ({in_gib(half.needed_bytes)}{short})")
    elif engine.config.kv_dtype is None:
        small = plan_engine(replace(asked, kv_dtype="int8"), engine.model, path, machine).memory
        if small.missing_bytes < memory.missing_bytes:
            short = f", {in_gib(small.missing_bytes)} still missing" if small.missing_bytes else ""
            remedies.append(f"--kv-dtype int8 ({in_gib(small.needed_bytes)}{short})")
    longest = min(memory.fitting_len, claim)
    if longest:
        remedies.append(f"--length {longest}")
    remedies.append(f"{in_gib(memory.needed_bytes)} of usable memory")
    if not longest:
        remedies.append("a smaller model")
    return [("so that it fits", ", or ".join(remedies))]


def _size_rows(engine: ResolvedEngine) -> list[tuple[str, str]]:
    """How a prompt would be cut, and why so."""
    config = engine.config
    rows = [("prefill chunk", f"{config.prefill_chunk_len:,} tokens"),
            ("requests together", f"{config.max_num_requests}")]
    return [*rows, ("because", engine.sizes_reason)] if engine.sizes_reason else rows


def _place_rows(engine: ResolvedEngine) -> list[tuple[str, str]]:
    """Show what is kept besides the device's own blocks, and how many tokens that is."""
    memory, size = engine.memory, engine.tiers.block_bytes
    return [(name, f"{in_gib(count)} ({count // size * memory.block_size:,} tokens)")
            for name, count in places_bytes(engine.tiers).items()]


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
    diagonal costs at most `length` pairs."""
    budgets = [min(plan.budget_share * (v + s), length)
               for row_v, row_s in zip(plan.vertical, plan.slash, strict=True)
               for v, s in zip(row_v, row_s, strict=True)]
    mean = sum(budgets) / len(budgets)
    # A query at position p sees min(p, budget) keys.
    pairs = length * length / 2 if length <= mean else mean * mean / 2 + (length - mean) * mean
    return min(1.0, pairs / (length * length / 2))
