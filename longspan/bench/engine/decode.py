"""`longspan bench decode`: one step of a real shape behind contexts of any length.

The KV cache is filled with random numbers; nothing is prefilled. The floor is what a step must
read (weights once, keys and values once) over the bandwidth of a large copy on the same device.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace

from longspan import ops
from longspan.attention.rope import build_rotary
from longspan.bench.engine.engine import (
    EngineSizes,
    ShapeEngine,
    decode_step,
    open_engine,
    plan_engine,
    precision_key,
    weight_bytes_read,
)
from longspan.bench.ops import checks
from longspan.bench.ops.dense import copy_row
from longspan.bench.session import BenchSession
from longspan.bench.shapes import Shape, shape_label
from longspan.bench.timing import Repeats, measure, recorded, rounded, synchronize
from longspan.commands.console import show_table
from longspan.engine.resolve import resolve_forms
from longspan.engine.step import ScheduledBatch
from longspan.errors import NotEnoughMemoryError
from longspan.units import GIB

WARMUP_STEPS = 3
IN_FLIGHT = 2
"""Steps launched before the oldest is waited for, as a server does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """What was asked for on the command line."""

    contexts: tuple[int, ...]
    """Tokens of each request, the new one included."""
    batches: tuple[int, ...]
    layers: int | None
    steps: int
    memory_gib: float | None
    rows: tuple[int, ...] = ()
    """Numbers of last tokens of one sequence whose attention is timed together."""
    quantization: str | None = None
    kv_dtype: str | None = None
    copy_bytes: int | None = None
    """Bytes of the copy whose bandwidth makes the floor; the default depends on the device."""


def run(session: BenchSession, shape: Shape, options: DecodeOptions) -> int:
    """Measure, write rows, print the table. Returns the exit status."""
    cut, total = shape.cut(options.layers), shape.model.num_layers
    is_cuda = session.device.startswith("cuda")
    num_bytes = options.copy_bytes or (GIB if is_cuda else GIB // 64)
    copied = session.attempt(
        {"shape": "copy", "context_len": 0, "batch_size": 0, "layers": 0},
        partial(copy_row, session.device, num_bytes, Repeats()))
    if copied is None:
        return session.finish()
    pairs = sorted({(context, batch) for context in options.contexts for batch in options.batches},
                   key=lambda pair: -pair[0] * pair[1])
    fitting = [pair for pair in pairs if _fits(cut, session.device, options, *pair)]
    keys = [{"shape": shape.name, "context_len": context, "batch_size": batch,
             "layers": cut.model.num_layers,
             **precision_key(options.quantization, options.kv_dtype)} for context, batch in pairs]
    for pair, key in zip(pairs, keys, strict=True):
        if pair not in fitting:
            session.attempt(key, partial(_refuse, cut, session.device, options, *pair), ours=False)
    if fitting:
        context, batch = fitting[0]
        with open_engine(cut, session.device, _sizes(options, context, batch, fitting)) as engine:
            for pair, key in zip(pairs, keys, strict=True):
                if pair in fitting:
                    session.attempt(key, partial(
                        _measure, session, cut, options, engine, pair, total,
                        copied["tb_per_s"]))
            for context in sorted({context for context, _ in fitting}):
                _measure_rows(session, cut, options, engine, context)
    show(session.rows)
    return session.finish()


def _measure(
    session: BenchSession, shape: Shape, options: DecodeOptions, engine: ShapeEngine,
    pair: tuple[int, int], total_layers: int, copy_tb_per_s: float,
) -> dict[str, Any]:
    context, batch = pair
    device = session.device
    checks.check_decode(shape, device)
    step = decode_step(engine, context, batch)
    sync_ms = time_steps(engine, step, device, options.steps, in_flight=1)
    step_ms = time_steps(engine, step, device, options.steps, in_flight=IN_FLIGHT)
    attention_ms, kv_bytes = _attention(shape, engine, device, context, batch)
    layers = shape.model.num_layers
    num_bytes = weight_bytes_read(
        shape, device, batch, resolve_forms(engine.plan.config, shape.model)) + layers * kv_bytes
    floor_ms = num_bytes / copy_tb_per_s / 1e9
    return {
        "total_layers": total_layers, "step_ms": rounded(statistics.median(step_ms), 5),
        "low_ms": rounded(min(step_ms), 5), "high_ms": rounded(max(step_ms), 5),
        "n": len(step_ms), "sync_step_ms": rounded(statistics.median(sync_ms), 5),
        "floor_ms": rounded(floor_ms, 5), "copy_tb_per_s": copy_tb_per_s,
        "over_floor": rounded(statistics.median(step_ms) / floor_ms, 4),
        "attention_ms": rounded(attention_ms * layers, 5),
        "kv_tb_per_s": rounded(kv_bytes / attention_ms / 1e9, 4),
        "tokens_per_s": rounded(1000 * batch / statistics.median(step_ms), 5)}


def _measure_rows(
    session: BenchSession, shape: Shape, options: DecodeOptions, engine: ShapeEngine, context: int,
) -> None:
    """Time the attention of a few rows behind one context, beside that of a single one."""
    alone_ms: float | None = None
    counts = options.rows
    for count in (1, *(count for count in sorted(set(counts)) if count > 1)) if counts else ():
        def work(count: int = count, alone_ms: float | None = alone_ms) -> dict[str, Any]:
            attention_ms, kv_bytes = _attention(shape, engine, session.device, context, rows=count)
            return {"attention_ms": rounded(attention_ms * shape.model.num_layers, 5),
                    "kv_tb_per_s": rounded(kv_bytes / attention_ms / 1e9, 4),
                    "over_one_row": rounded(attention_ms / (alone_ms or attention_ms), 4),
                    "layer_ms": rounded(attention_ms, 5)}
        row = session.attempt({"shape": shape.name, "context_len": context, "batch_size": 1,
                               "layers": shape.model.num_layers, "rows": count,
                               **precision_key(options.quantization, options.kv_dtype)}, work)
        alone_ms = alone_ms or (row["layer_ms"] if row else None)


def time_steps(
    engine: ShapeEngine, step: ScheduledBatch, device: str, count: int, *, in_flight: int
) -> list[float]:
    """Return the wall times between the results of steps that end with ``step``, each a token
    further, ms; ``in_flight`` are launched at a time."""
    launched: deque[Any] = deque()
    steps = steps_before(step, WARMUP_STEPS + in_flight - 1 + count)
    for _ in range(WARMUP_STEPS):
        engine.runner.launch(next(steps)).wait()
    synchronize(device)
    for _ in range(in_flight - 1):
        launched.append(engine.runner.launch(next(steps)))
    times, before_s = [], time.perf_counter()
    for _ in range(count):
        launched.append(engine.runner.launch(next(steps)))
        launched.popleft().wait()
        now_s = time.perf_counter()
        times.append(1000 * (now_s - before_s))
        before_s = now_s
    while launched:
        launched.popleft().wait()
    return times[1:] if in_flight > 1 and len(times) > 1 else times


def steps_before(step: ScheduledBatch, count: int) -> Iterator[ScheduledBatch]:
    """Decode steps of the same requests, run ahead, the last one where ``step`` stands; a context
    that is shorter than that begins with its first token several times."""
    for back in reversed(range(count)):
        yield replace(step, slices=tuple(
            replace(item, token_ids=array("i"), prompt_len=1,
                    cached_len=max(1, item.cached_len - back)) for item in step.slices))


def _attention(
    shape: Shape, engine: ShapeEngine, device: str, context: int, batch: int = 1, rows: int = 0,
) -> tuple[float, int]:
    """Time of one layer's decode attention, ms, and the bytes of keys and values it reads: a share
    of all layers', recorded one behind the other as a decode step is, each with its own cache.

    Args:
        rows: instead of a token of each request that many of a single one.
    """
    model, size = shape.model, engine.plan.config.block_size
    num_blocks = -(-context // size)
    first = torch.arange(batch, device=device)[:, None] * num_blocks
    tables = first + torch.arange(num_blocks, device=device)
    lens = torch.full((batch,), context, device=device)
    scales = torch.full((batch,), model.head_dim**-0.5, device=device)
    caches = engine.runner.caches
    q = torch.randn(
        rows or batch, model.num_heads, model.head_dim, device=device, dtype=caches[0].dtype)
    rotary = build_rotary(head_dim=model.head_dim, rope_theta=model.rope_theta, device=device,
                          scaling=model.rope_scaling, max_model_len=context, dca=model.dca)

    def work() -> None:
        for cache in caches:
            if rows:
                ops.prefill_attention(q, cache, tables[0], context - rows, rotary,
                                      model.head_dim**-0.5)
            else:
                ops.decode_attention(q, cache, tables, lens, rotary, scales)
    with torch.inference_mode():
        timing = measure(recorded(work, device), device, flush_cache=True)
    head_bytes = model.head_dim * caches[0].k.element_size()
    if caches[0].k_scale is not None:
        head_bytes += caches[0].k_scale.element_size()
    kv_bytes = 2 * batch * context * model.num_kv_heads * head_bytes
    return timing.median_ms / len(caches), kv_bytes


def _sizes(
    options: DecodeOptions, context: int, batch: int, pairs: Sequence[tuple[int, int]]
) -> EngineSizes:
    """Return the sizes of an engine for the largest of the pairs."""
    size = 128
    num_tokens = max(batch * -(-context // size) * size for context, batch in pairs)
    return EngineSizes(
        max_model_len=max(context for context, _ in pairs), num_tokens=num_tokens,
        max_num_requests=max(batch for _, batch in pairs), memory_gib=options.memory_gib,
        quantization=options.quantization, kv_dtype=options.kv_dtype)


def _fits(shape: Shape, device: str, options: DecodeOptions, context: int, batch: int) -> bool:
    try:
        _refuse(shape, device, options, context, batch)
    except NotEnoughMemoryError:
        return False
    return True


def _refuse(
    shape: Shape, device: str, options: DecodeOptions, context: int, batch: int
) -> Mapping[str, Any]:
    """Raise `NotEnoughMemoryError` with the numbers."""
    plan_engine(shape, device, _sizes(options, context, batch, [(context, batch)]))
    return {}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the steps as a table on stdout."""
    show_table("decode", ("shape", "context", "requests", "step ms", "alone ms", "floor ms",
                          "over floor", "KV TB/s", "tokens/s"), [
        (shape_label(row), f"{row['context_len']:,}", row["batch_size"], f"{row['step_ms']:.3f}",
         f"{row['sync_step_ms']:.3f}", f"{row['floor_ms']:.3f}", f"{row['over_floor']:.2f}",
         f"{row['kv_tb_per_s']:.2f}", f"{row['tokens_per_s']:,.0f}")
        for row in rows if "step_ms" in row])
    few = [row for row in rows if "over_one_row" in row]
    if few:
        show_table("few rows", ("shape", "context", "rows", "attention ms", "KV TB/s",
                                "over one row"), [
            (shape_label(row), f"{row['context_len']:,}", row["rows"], f"{row['attention_ms']:.3f}",
             f"{row['kv_tb_per_s']:.2f}", f"{row['over_one_row']:.2f}") for row in few])
