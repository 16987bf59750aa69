"""Loads the engine that serves: its plan is sent first, then the weights are read."""

from __future__ import annotations

from contextlib import suppress

from longspan.config import EngineConfig
from longspan.engine.control.scheduler import SchedulerConfig
from longspan.engine.processes.backend import Engine, Send
from longspan.engine.processes.wire import Described
from longspan.engine.ranks.hub import Hub
from longspan.engine.resolve import resolve_forms
from longspan.engine.setup.compile_ahead import compile_steps
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.setup.group import group_memory, open_group
from longspan.engine.setup.tier_plan import places_bytes
from longspan.errors import LongspanError
from longspan.weight_form import PLAIN


def load_engine(config: EngineConfig, send: Send) -> tuple[SchedulerConfig, Engine]:
    """Load the checkpoint and make its engine. Raises `LongspanError` when the model cannot be
    loaded."""
    config, hub = open_group(config)
    try:
        return _load(config, hub, send)
    except BaseException as error:
        if hub is not None:
            hub.close(str(error))
        raise


def _load(
    config: EngineConfig, hub: Hub | None, send: Send,
) -> tuple[SchedulerConfig, Engine]:
    engine = ResolvedEngine.resolve(config, device=group_memory(hub))
    scheduler, memory = engine.scheduler_config(), engine.memory
    send(Described(
        path=engine.path, intake=engine.intake(), scheduler=scheduler,
        memory_bytes={weights_label(engine): memory.weights_bytes,
                      "workspace": memory.workspace_bytes,
                      kv_label(engine.config): memory.kv_bytes,
                      **places_bytes(engine.tiers)},
        sizes_reason=engine.sizes_reason))
    runner = engine.load_runner(hub)
    runner.record_graphs()
    if engine.config.device != "cpu":  # whose operations need no compiler
        runner.compile_ahead(compile_steps(
            scheduler, shares_rows=engine.config.context_parallel > 1))
    with suppress(LongspanError):  # the first request that wants a grammar is told
        runner.prepare()  # a large vocabulary takes a second, for which answers would pause
    return scheduler, runner


def kv_label(config: EngineConfig) -> str:
    """Return what the start-up report calls the KV cache."""
    notes = [config.kv_dtype] if config.kv_dtype else []
    if config.kv_parts > 1:  # no rank has all of it, and long prompts take somewhat longer
        notes.append(f"1/{config.kv_parts} a rank")
    return f"KV cache ({', '.join(notes)})" if notes else "KV cache"


def weights_label(engine: ResolvedEngine) -> str:
    """Return what the start-up report calls the weights."""
    form = resolve_forms(engine.config, engine.model).form
    return "weights" if form == PLAIN else f"weights ({form.kind})"
