"""`longspan bench cache`: a prompt's KV back from host memory and from disk, beside its prefill.

Random weights, random tokens, the real scheduler and runner in one process, with a server's step
budget. A short request decodes all the time; its longest pause is measured while blocks are copied.

- ``host``: on a pool that holds one prompt, another one evicts the first to pinned host memory.
  It is cancelled as soon as it begins, and the first one is asked again.
- ``disk``: the prompt is computed and written; then an engine that was just started reads it. The
  files are out of the page cache before that, and their plain reading is timed before and after.
- ``turns``: two prompts asked in turn on a pool that holds one; host memory holds the other.
- ``copies``: the same and ``host`` without a model, see `longspan.bench.engine.cache_copies`.
- ``cancelled``: a prompt is cancelled behind its middle and asked again; how many tokens of it are
  computed, and how many twice.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longspan.bench.engine.cache_copies import measure_copies
from longspan.bench.engine.cache_driver import begin, sizes_for
from longspan.bench.engine.disk_read import forget, read_bytes_per_s
from longspan.bench.engine.engine import EngineSizes, open_engine, plan_engine
from longspan.bench.session import BenchSession, CheckFailed
from longspan.bench.shapes import Shape
from longspan.bench.timing import rounded, synchronize
from longspan.commands.console import seconds, show_table
from longspan.engine.prefix_origin import PrefixOrigin
from longspan.errors import LongspanError
from longspan.units import GIB, in_gib

PLACES = ("host", "disk", "turns", "copies", "cancelled")
SPARE = 1.03
"""Room in a place, as a share of the prompt's KV."""
SWAP_GIB = {"cpu": 0.05, "cuda": 8.0}
"""Host memory besides one prompt, through which two change places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """What was asked for on the command line."""

    lengths: tuple[int, ...]
    """Prompt lengths, tokens."""
    places: tuple[str, ...]
    """Some of `PLACES`."""
    folder: Path
    """Empty or missing; on the disk that is measured."""
    chunk_len: int | None = None
    attention: str = "sparse"
    turns: int = 2
    """Times that each of two prompts is asked again."""
    host_gib: float | None = None
    """Host memory where two take turns; None: for one of them and a little."""

    def __post_init__(self) -> None:
        for name in self.places:
            if name not in PLACES:
                raise LongspanError(f"--places: {name!r} is not one of {', '.join(PLACES)}")
        if self.attention not in ("dense", "sparse"):
            raise LongspanError(f"--attention: {self.attention!r} is not one of dense, sparse")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise LongspanError(f"--dir: {self.folder} is not empty; name another folder")
        if self.turns < 1:
            raise LongspanError(f"--turns must be 1 or more, not {self.turns}")


def run(session: BenchSession, shape: Shape, options: CacheOptions) -> int:
    """Measure, write rows, print the table. Returns the exit status."""
    measures = {"host": _measure_host, "disk": _measure_disk, "turns": _measure_turns,
                "copies": _measure_copies, "cancelled": _measure_cancelled}
    for place in options.places:
        for length in options.lengths:
            key = {"shape": shape.name, "place": place, "num_tokens": length,
                   "attention": options.attention,
                   "plan": shape.plan_label if options.attention == "sparse" else None}
            session.attempt(key, partial(measures[place], session.device, shape, options, length))
    show(session.rows)
    return session.finish()


def _document_bytes(device: str, shape: Shape, options: CacheOptions, length: int) -> int:
    """Return the size of a prompt's KV, with what decodes beside it."""
    sizes = sizes_for(length, options.chunk_len, kv_host_gib=1.0)
    return plan_engine(shape, device, sizes).tiers.block_bytes * (length // 128 + 64)


def _measure_host(
    device: str, shape: Shape, options: CacheOptions, length: int,
) -> dict[str, Any]:
    host_gib = SPARE * _document_bytes(device, shape, options, length) / GIB
    sizes = sizes_for(length, options.chunk_len, kv_host_gib=host_gib)
    with open_engine(shape, device, sizes) as engine:
        driver = begin(engine, sparse=options.attention == "sparse")
        prefill_s, token, _ = driver.prefill("document", length, 2)
        driver.watch()
        save_s, save_pause = driver.evict(length), driver.longest_pause
        driver.watch()
        ttft_s, again, request = driver.prefill("again", length, 2)
        pause, budget_s = driver.longest_pause, engine.plan.config.step_budget_s
        driver.end()
        synchronize(device)
    _check_token(again, token, "host memory")
    return {**_figures(prefill_s, ttft_s, request.origin, engine.plan.tiers.block_bytes),
            "save_s": rounded(save_s, 4), "save_pause_s": save_pause["pause_s"],
            "pause_s": pause["pause_s"], "save_pause": save_pause, "pause": pause,
            "step_budget_s": budget_s}


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
    num_bytes = _document_bytes(device, shape, options, length)
    host_gib = options.host_gib or SPARE * num_bytes / GIB + SWAP_GIB[device.split(":")[0]]
    plan = plan_engine(shape, device, sizes_for(length, options.chunk_len, kv_host_gib=host_gib))
    return {**measure_copies(plan, device, length, options.turns,
                             sparse=options.attention == "sparse"),
            "host_gib": rounded(host_gib, 4), "step_budget_s": plan.config.step_budget_s}


def _measure_disk(
    device: str, shape: Shape, options: CacheOptions, length: int,
) -> dict[str, Any]:
    folder = options.folder / f"{shape.name}-{length}"
    num_bytes = int(SPARE * _document_bytes(device, shape, options, length))
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
        begun_s, write_pause_s = time.perf_counter(), driver.longest_pause_s
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
        pause_s, budget_s = driver.longest_pause_s, engine.plan.config.step_budget_s
        driver.watch()
        question_s, _, _ = driver.prefill("question", length, 2, question=8)
        question_pause_s = driver.longest_pause_s
        driver.end()
    rates.append(read_bytes_per_s(files))
    _check_token(again, token, "disk")
    figures = _figures(prefill_s, ttft_s, request.origin, engine.plan.tiers.block_bytes)
    return {**figures, "disk_own_gib_per_s": [rounded(rate / GIB, 4) for rate in rates],
            "over_disk_own": rounded(max(rates) / GIB / figures["gib_per_s"], 3),
            "write_s": rounded(prefill_s + write_rest_s, 4),
            "write_rest_s": rounded(write_rest_s, 4),
            "write_pause_s": rounded(write_pause_s, 3), "pause_s": rounded(pause_s, 3),
            "question_s": rounded(question_s, 3), "question_pause_s": rounded(question_pause_s, 3),
            "step_budget_s": budget_s}


def _measure_turns(
    device: str, shape: Shape, options: CacheOptions, length: int,
) -> dict[str, Any]:
    num_bytes = _document_bytes(device, shape, options, length)
    host_gib = options.host_gib or SPARE * num_bytes / GIB + SWAP_GIB[device.split(":")[0]]
    sizes = sizes_for(length, options.chunk_len, kv_host_gib=host_gib)
    turns = list[tuple[float, PrefixOrigin | None]]()
    with open_engine(shape, device, sizes) as engine:
        driver = begin(engine, sparse=options.attention == "sparse")
        driver.watch()
        first = [driver.prefill(f"document {seed}", length, seed) for seed in (2, 3)]
        first_pause_s = driver.longest_pause_s
        driver.watch()
        for turn in range(options.turns):
            for seed, (_, token, _) in zip((2, 3), first, strict=True):
                ttft_s, again, request = driver.prefill(f"{seed} again {turn}", length, seed)
                _check_token(again, token, "host memory")
                turns.append((ttft_s, request.origin))
        pause, budget_s = driver.longest_pause, engine.plan.config.step_budget_s
        driver.end()
    prefill_s, worst_s = first[0][0], max(ttft_s for ttft_s, _ in turns)
    origin = min((origin for _, origin in turns), key=lambda origin: (
        0 if origin is None else origin.num_host_tokens))
    return {**_figures(prefill_s, worst_s, origin, engine.plan.tiers.block_bytes),
            "prefills_s": [rounded(seconds, 4) for seconds, _, _ in first],
            "turns_s": [rounded(seconds, 4) for seconds, _ in turns],
            "host_gib": rounded(host_gib, 4), "first_pause_s": rounded(first_pause_s, 3),
            "pause_s": pause["pause_s"], "pause": pause, "step_budget_s": budget_s}


def _check_room(folder: Path, num_bytes: int) -> None:
    """Raise `LongspanError` where the disk has no room for the files."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise LongspanError(f"the files take {in_gib(num_bytes)}, and {in_gib(free)} are free in "
                            f"{place}; use shorter --lengths or another --dir")


def _check_token(again: int, token: int, place: str) -> None:
    if again != token:
        raise CheckFailed(f"the token is {again} with KV from {place}, and was {token}")


def _figures(
    prefill_s: float, ttft_s: float, origin: PrefixOrigin | None, block_bytes: int,
) -> dict[str, Any]:
    if origin is None:
        raise CheckFailed("nothing was loaded: the prompt was computed again")
    num_tokens = origin.num_host_tokens + origin.num_disk_tokens
    num_bytes = num_tokens // 128 * block_bytes
    return {"prefill_s": rounded(prefill_s, 5), "load_s": rounded(origin.load_s, 5),
            "ttft_s": rounded(ttft_s, 5), "loaded_tokens": num_tokens,
            "gib": rounded(num_bytes / GIB, 5), "gib_per_s": rounded(
                num_bytes / GIB / origin.load_s, 4),
            "ttft_over_prefill": rounded(ttft_s / prefill_s, 4)}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print what came back, how fast."""
    show_table("KV that comes back", (
        "shape", "from", "tokens", "GiB", "prefill", "loaded in", "GiB/s", "first token",
        "longest pause"), [
        (row["shape"], row["place"], f"{row['num_tokens']:,}", f"{row['gib']:.1f}",
         seconds(row["prefill_s"]) if "prefill_s" in row else "", seconds(row["load_s"]),
         f"{row['gib_per_s']:.2f}", seconds(row["ttft_s"]), seconds(row["pause_s"]))
        for row in rows if "load_s" in row])
