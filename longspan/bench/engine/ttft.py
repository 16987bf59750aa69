"""`longspan bench ttft`: time to the first token of a real shape, dense and sparse.

Random weights, random tokens, the real scheduler and runner in one process. The wall clock runs
from handing the request to the loop until its first token is there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

from longspan.bench.engine.engine import (
    EngineSizes,
    ShapeEngine,
    open_engine,
    plan_engine,
    precision_key,
    random_ids,
)
from longspan.bench.ops import checks
from longspan.bench.session import BenchSession, CheckFailed
from longspan.bench.shapes import Shape, shape_label
from longspan.bench.timing import (
    LinearRegions,
    Regions,
    noting_compilations,
    rounded,
    synchronize,
)
from longspan.commands.console import percent, seconds, show_table
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.request import Request, SamplingParams
from longspan.engine.setup.compile_ahead import compile_steps
from longspan.errors import LongspanError, NotEnoughMemoryError
from longspan.units import GIB

LINEAR = "linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class TtftOptions:
    """What was asked for on the command line."""

    lengths: tuple[int, ...]
    """Prompt lengths, tokens."""
    attention: tuple[str, ...]
    layers: int | None
    """Only the first layers are computed; None: all."""
    chunk_len: int | None
    memory_gib: float | None
    quantization: str | None = None
    kv_dtype: str | None = None
    ranks: tuple[int, ...] = (1,)
    """Ranks that share the prompt, for one measurement after the other."""
    runs: int = 1
    """Prefills that are timed, one after the other in the same engine; rows hold their mean."""

    def __post_init__(self) -> None:
        for name in self.attention:
            if name not in ("dense", "sparse"):
                raise LongspanError(f"--attention: {name!r} is not one of dense, sparse")
        if self.layers == 1:
            raise LongspanError("--layers 1 leaves only the last layer, which attends for the "
                                "sampled row alone; take 2 or more")


def run(session: BenchSession, shape: Shape, options: TtftOptions) -> int:
    """Measure, write rows, print the table. Returns the exit status."""
    cut = shape.cut(options.layers)
    checked: set[str] = set()
    for length in options.lengths:
        chunk_len = _chunk_len(cut, session.device, options, length)
        for attention, ranks in product(options.attention, options.ranks):
            key = {"shape": shape.name, "num_tokens": length, "attention": attention,
                   "plan": shape.plan_label if attention == "sparse" else None,
                   "layers": cut.model.num_layers, "gpus": ranks, "chunk_len": chunk_len,
                   **precision_key(options.quantization, options.kv_dtype)}
            session.attempt(key, partial(
                _measure, session, cut, replace(options, ranks=(ranks,)), checked, length,
                attention, shape.model.num_layers))
    show(session.rows)
    return session.finish()


def _chunk_len(shape: Shape, device: str, options: TtftOptions, length: int) -> int | None:
    """Return the prefill chunk of the engine to come; None: it does not fit."""
    try:
        return plan_engine(shape, device, _sizes(options, length)).config.prefill_chunk_len
    except NotEnoughMemoryError:
        return options.chunk_len


def _sizes(options: TtftOptions, length: int) -> EngineSizes:
    return EngineSizes(max_model_len=length + 1, num_tokens=length + 1,
                       chunk_len=options.chunk_len, memory_gib=options.memory_gib,
                       quantization=options.quantization, kv_dtype=options.kv_dtype,
                       ranks=options.ranks[0])


def _measure(
    session: BenchSession, shape: Shape, options: TtftOptions, checked: set[str], length: int,
    attention: str, total_layers: int,
) -> dict[str, Any]:
    is_sparse, device = attention == "sparse", session.device
    if attention not in checked:
        _check(shape, device, is_sparse)
        checked.add(attention)
    with open_engine(shape, device, _sizes(options, length)) as engine:
        chunk = engine.plan.config.prefill_chunk_len
        assert chunk is not None
        engine.runner.compile_ahead(compile_steps(engine.plan.scheduler_config()))
        prefill(engine, min(length, chunk + chunk // 2), device, sparse=is_sparse)
        regions = Regions(device)
        engine.runner.observe(regions)
        with LinearRegions(regions, LINEAR), noting_compilations(device) as compiled:
            runs = [prefill(engine, length, device, sparse=is_sparse) for _ in range(options.runs)]
        peak_bytes = engine.runner.peak_memory_bytes()
    ttft_s, density = fmean(taken_s for taken_s, _ in runs), runs[0][1]
    share = shares(regions.totals_ms(), ttft_s * options.runs)
    if options.ranks[0] > 1:
        del share[LINEAR]  # other threads' products are not seen; they are in the rest
    scaled_s = scaled(ttft_s, share, shape.model.num_layers, total_layers)
    return {"ttft_s": rounded(ttft_s, 5), "ttft_scaled_s": rounded(scaled_s, 5),
            "total_layers": total_layers, "density": rounded(density, 4),
            "peak_memory_gib": rounded(peak_bytes / GIB, 5), "n": options.runs,
            "runs_s": [rounded(taken_s, 5) for taken_s, _ in runs], "share": share,
            **({"compiled": sorted(compiled)} if compiled else {})}


def scaled(ttft_s: float, share: Mapping[str, float], layers: int, total_layers: int) -> float:
    """Estimate what all layers would take, from a run of the first ``layers`` (at least 2),
    seconds.

    The last layer attends for the sampled row only, so attention is that of ``layers - 1``. All
    else is scaled by layers, which errs low: the last layer has fewer projections, too.
    """
    if layers == total_layers:
        return ttft_s
    attention_s = (share["attention"] + share["selection"]) * ttft_s
    return (attention_s * (total_layers - 1) / (layers - 1)
            + (ttft_s - attention_s) * total_layers / layers)


def _check(shape: Shape, device: str, is_sparse: bool) -> None:
    checks.check_dense(shape, device)
    if is_sparse:
        checks.check_sparse(shape, device, shape.plan.layer(0), shape.plan.mean_correction)


def prefill(
    engine: ShapeEngine, length: int, device: str, *, sparse: bool
) -> tuple[float, float]:
    """Prefill one prompt through scheduler, loop and runner. Returns (seconds to the first token,
    density).

    The peak of the device's allocator is counted from here on. Raises `CheckFailed` when the
    engine gives the request up: logits are not finite.
    """
    import torch

    loop = Loop(Scheduler(engine.plan.scheduler_config()), engine.runner.transport())
    request = Request(
        request_id="0", prompt_ids=random_ids(length, engine.plan.model.vocab_size, length),
        params=SamplingParams(max_tokens=1, ignore_eos=True), sparse=sparse)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    started_s = time.perf_counter()
    loop.add(request)
    kept = causal = 0.0
    has_token = False
    while not has_token:
        report = loop.turn()
        kept, causal = kept + report.kept_pairs, causal + report.causal_pairs
        for update in report.updates:
            if update.failure:
                raise CheckFailed(f"{update.failure}; not timed")
            has_token |= update.token_id is not None
    synchronize(device)
    return time.perf_counter() - started_s, kept / causal


def shares(totals_ms: Mapping[str, float], ttft_s: float) -> dict[str, float]:
    """Return the shares of the time to first token; rest: norms, activations, KV writes, sampling,
    the host."""
    parts = {LINEAR: (LINEAR,), "selection": ("selection",), "attention": ("sparse", "dense")}
    found = {part: sum(totals_ms.get(name, 0.0) for name in names) / 1000 / ttft_s
             for part, names in parts.items()}
    found["rest"] = 1 - sum(found.values())
    return {name: round(value, 4) for name, value in found.items()}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print times and shares as a table on stdout."""
    names = (LINEAR, "selection", "attention", "rest")
    show_table("time to first token", (
        "shape", "tokens", "attention", "GPUs", "layers", "measured", "all layers", "density",
        "GiB", *names), [
        (shape_label(row), f"{row['num_tokens']:,}", row["attention"], str(row["gpus"]),
         f"{row['layers']}/{row['total_layers']}", seconds(row["ttft_s"]),
         seconds(row["ttft_scaled_s"]), percent(row["density"]), f"{row['peak_memory_gib']:.1f}",
         *(percent(row["share"].get(name)) for name in names))
        for row in rows if "error" not in row])
