"""`longspan bench cache`: a prompt's KV back from host memory and from disk, beside its prefill.

Random weights, random tokens, the real scheduler and runner in one process, with a server's step
budget. A short request decodes all the time; its longest pause is measured while blocks are copied.

- ``host``: on a pool that holds one prompt, another one evicts the first to pinned host memory.
  It is cancelled as soon as it begins, and the first one is asked again.
- ``disk``: the prompt is computed and written; then an engine that was just started reads it. The
  files are out of the page cache before that, and their plain reading is timed before and after.
- ``turns``: two prompts asked in turn on a pool that holds one; host memory holds the other. With
  ``host`` before it, both are measured in one engine.
- ``copies``: the same and ``host`` without a model, see `longspan.bench.engine.cache_copies`.
- ``cancelled``: a prompt is cancelled behind its middle and asked again; how many tokens of it are
  computed, and how many twice.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from longspan.bench.engine.cache_copies import measure_copies
from longspan.bench.engine.cache_driver import begin, sizes_for
from longspan.bench.engine.cache_host import HostMeasures
from longspan.bench.engine.cache_options import (
    SPARE,
    SWAP_GIB,
    CacheOptions,
    check_token,
    document_bytes,
    figures,
    written_bytes,
)
from longspan.bench.engine.disk_read import forget, read_bytes_per_s
from longspan.bench.engine.engine import EngineSizes, open_engine, plan_engine
from longspan.bench.session import BenchSession, CheckFailed
from longspan.bench.shapes import Shape
from longspan.bench.timing import rounded
from longspan.commands.console import seconds, show_table
from longspan.errors import LongspanError
from longspan.units import GIB, in_gib


def run(session: BenchSession, shape: Shape, options: CacheOptions) -> int:
    """Measure, write rows, print the table. Returns the exit status."""
    measures = {"disk": _measure_disk, "copies": _measure_copies, "cancelled": _measure_cancelled}
    for length in options.lengths:
        key = {"shape": shape.name, "place": "", "num_tokens": length,
               "attention": options.attention,
               "plan": shape.plan_label if options.attention == "sparse" else None}
        with HostMeasures(session.device, shape, options, length) as host:
            for place in (place for place in options.places if place in host.measures):
                session.attempt({**key, "place": place}, host.measures[place])
        for place in (place for place in options.places if place in measures):
            session.attempt({**key, "place": place}, partial(
                measures[place], session.device, shape, options, length))
    show(session.rows)
    return session.finish()


def _measure_cancelled(
    device: str, shape: Shape, options: CacheOptions, length: int,
) -> dict[str, Any]:
    sizes = sizes_for(length, options.chunk_len)
    with open_engine(shape, device, sizes) as engine:
        driver = begin(engine, sparse=options.attention == "sparse")
        row, chunk_len = driver.prefill_twice(length), engine.plan.config.prefill_chunk_len
        driver.end()
    twice = row["computed_tokens"] + row["computed_again"] - length
    if not 0 <= twice <= (chunk_len or 0):
        raise CheckFailed(f"{twice:,} tokens were computed twice; a chunk has {chunk_len:,}")
    return {**row, "computed_twice": twice, "chunk_len": chunk_len}


def _measure_copies(
    device: str, shape: Shape, options: CacheOptions, length: int,
) -> dict[str, Any]:
    num_bytes = document_bytes(device, shape, options, length)
    host_gib = options.host_gib or SPARE * num_bytes / GIB + SWAP_GIB[device.split(":")[0]]
    plan = plan_engine(shape, device, sizes_for(length, options.chunk_len, kv_host_gib=host_gib))
    return {**measure_copies(plan, device, length, options.turns,
                             sparse=options.attention == "sparse"),
            "host_gib": rounded(host_gib, 4), "step_budget_s": plan.config.step_budget_s}


def _measure_disk(
    device: str, shape: Shape, options: CacheOptions, length: int,
) -> dict[str, Any]:
    folder = options.folder / f"{shape.name}-{length}"
    num_bytes = written_bytes(device, shape, options, length)
    _check_room(options.folder, num_bytes)
    sizes = sizes_for(length, options.chunk_len, kv_dir=str(folder), kv_disk_gib=num_bytes / GIB)
    try:
        return _write_and_read(device, shape, options, length, sizes, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_and_read(
    device: str, shape: Shape, options: CacheOptions, length: int, sizes: EngineSizes,
    folder: Path,
) -> dict[str, Any]:
    is_sparse = options.attention == "sparse"
    with open_engine(shape, device, sizes) as engine:
        driver = begin(engine, sparse=is_sparse)
        driver.watch()
        prefill_s, token, _ = driver.prefill("document", length, 2)
        begun_s, write_pause = time.perf_counter(), driver.longest_pause
        driver.settle()
        write_rest_s = time.perf_counter() - begun_s
        driver.end()
    files = sorted(folder.glob("*.safetensors"))
    rates = [read_bytes_per_s(files)]
    forget(files)
    with open_engine(shape, device, sizes) as engine:
        driver = begin(engine, sparse=is_sparse)
        driver.watch()
        ttft_s, again, request = driver.prefill("again", length, 2)
        pause, budget_s = driver.longest_pause, engine.plan.config.step_budget_s
        driver.watch()
        question_s, _, _ = driver.prefill("question", length, 2, question=8)
        question_pause_s = driver.longest_pause_s
        driver.end()
    # with the engine's budget nothing is deleted; where the disk itself is full something may be
    rates.append(read_bytes_per_s([file for file in files if file.exists()]))
    check_token(again, token, "disk")
    found = figures(prefill_s, ttft_s, request.origin, engine.plan.tiers.block_bytes)
    return {**found, "disk_own_gib_per_s": [rounded(rate / GIB, 4) for rate in rates],
            "over_disk_own": rounded(max(rates) / GIB / found["gib_per_s"], 3),
            "write_s": rounded(prefill_s + write_rest_s, 4),
            "write_rest_s": rounded(write_rest_s, 4),
            "write_pause_s": write_pause["pause_s"], "write_pause": write_pause,
            "pause_s": pause["pause_s"], "pause": pause,
            "question_s": rounded(question_s, 3), "question_pause_s": rounded(question_pause_s, 3),
            "step_budget_s": budget_s}


def _check_room(folder: Path, num_bytes: int) -> None:
    """Raise `LongspanError` where the disk has no room for the files."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise LongspanError(f"the files take {in_gib(num_bytes)}, and {in_gib(free)} are free in "
                            f"{place}; use shorter --lengths or another --dir")


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print what came back, how fast."""
    show_table("KV that comes back", (
        "shape", "from", "tokens", "GiB", "prefill", "loaded in", "GiB/s", "first token",
        "longest pause"), [
        (row["shape"], row["place"], f"{row['num_tokens']:,}", f"{row['gib']:.1f}",
         seconds(row["prefill_s"]) if "prefill_s" in row else "", seconds(row["load_s"]),
         f"{row['gib_per_s']:.2f}", seconds(row["ttft_s"]), seconds(row["pause_s"]))
        for row in rows if "load_s" in row])
