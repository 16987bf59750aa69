"""`longspan bench cache`: a prompt's KV back from host memory and from disk, beside its prefill.

Random weights, random tokens, the real scheduler and runner in one process, with a server's step
budget. A short request decodes all the time; its longest pause is measured while blocks are copied.

- ``host``: on a pool that holds one prompt, another one evicts the first to pinned host memory.
  It is cancelled as soon as it begins, and the first one is asked again.
- ``disk``: the prompt is computed and written; then an engine that was just started reads it. The
  files are out of the page cache before that, and their plain reading is timed beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longspan.bench.engine.engine import (
    EngineSizes,
    ShapeEngine,
    open_engine,
    plan_engine,
    random_ids,
)
from longspan.bench.session import BenchSession, CheckFailed
from longspan.bench.shapes import Shape
from longspan.bench.timing import rounded, synchronize
from longspan.commands.console import seconds, show_table
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.request import Request, SamplingParams
from longspan.engine.setup.compile_ahead import compile_steps
from longspan.errors import LongspanError
from longspan.units import GIB

DECODING_LEN, DECODED_LEN = 128, 4_000
READ_BYTES, NUM_READERS = 16 * 1024**2, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """What was asked for on the command line."""

    lengths: tuple[int, ...]
    """Prompt lengths, tokens."""
    places: tuple[str, ...]
    """``host`` and ``disk``."""
    folder: Path
    """Empty or missing; on the disk that is measured."""
    chunk_len: int | None = None
    attention: str = "sparse"

    def __post_init__(self) -> None:
        for name in self.places:
            if name not in ("host", "disk"):
                raise LongspanError(f"--places: {name!r} is not one of host, disk")
        if self.attention not in ("dense", "sparse"):
            raise LongspanError(f"--attention: {self.attention!r} is not one of dense, sparse")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise LongspanError(f"--dir: {self.folder} is not empty; name another folder")


class Driver:
    """An engine's loop, a request that decodes, and what happens meanwhile."""

    def __init__(self, engine: ShapeEngine, *, sparse: bool) -> None:
        self._engine, self._sparse = engine, sparse
        self.scheduler = Scheduler(engine.plan.scheduler_config())
        self._loop = Loop(self.scheduler, engine.runner.transport(), queues_prefill=False)
        self._tokens: dict[str, int] = {}
        self._decoded_s = 0.0
        self.longest_pause_s = 0.0
        """Between two tokens of the decoding request, since `watch`."""

    def decode(self) -> None:
        """Begin to decode, until the end."""
        self.add("decoding", DECODING_LEN, 1, DECODED_LEN)
        self.turn_until(lambda: "decoding" in self._tokens)

    def watch(self) -> None:
        """Measure pauses from now on."""
        self.longest_pause_s, self._decoded_s = 0.0, time.perf_counter()

    def add(self, name: str, length: int, seed: int, num_tokens: int = 1) -> Request:
        """Hand in a prompt."""
        request = Request(
            request_id=name,
            prompt_ids=random_ids(length, self._engine.plan.model.vocab_size, seed),
            params=SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0),
            sparse=self._sparse and num_tokens == 1)
        self._loop.add(request)
        return request

    def prefill(self, name: str, length: int, seed: int) -> tuple[float, int, Request]:
        """Ask and wait for the first token: seconds, the token, the request."""
        begun_s = time.perf_counter()
        request = self.add(name, length, seed)
        self.turn_until(lambda: name in self._tokens)
        return time.perf_counter() - begun_s, self._tokens[name], request

    def cancel(self, name: str) -> None:
        """Cancel a request and wait until its blocks are free."""
        self._loop.abort(name)
        self.turn_until(lambda: name not in self.scheduler._running)

    def settle(self) -> None:
        """Wait until everything is written."""
        self.turn_until(lambda: self.scheduler.tiers.is_idle)

    def end(self) -> None:
        """Cancel what runs, and wait until nothing is under way."""
        self._loop.abort("decoding")
        self.turn_until(lambda: self._loop.is_idle)

    def turn_until(self, is_over: Callable[[], bool]) -> None:
        """Turn the loop. Raises `CheckFailed` when a request fails."""
        while not is_over():
            for update in self._loop.turn().updates:
                if update.failure:
                    raise CheckFailed(f"{update.failure}; not timed")
                if update.token_id is None:
                    continue
                self._tokens.setdefault(update.request_id, update.token_id)
                if update.request_id == "decoding":
                    now_s = time.perf_counter()
                    self.longest_pause_s = max(self.longest_pause_s, now_s - self._decoded_s)
                    self._decoded_s = now_s


def run(session: BenchSession, shape: Shape, options: CacheOptions) -> int:
    """Measure, write rows, print the table. Returns the exit status."""
    measures = {"host": _measure_host, "disk": _measure_disk}
    for place in options.places:
        for length in options.lengths:
            key = {"shape": shape.name, "place": place, "num_tokens": length,
                   "attention": options.attention,
                   "plan": shape.plan_label if options.attention == "sparse" else None}
            session.attempt(key, partial(measures[place], session.device, shape, options, length))
    show(session.rows)
    return session.finish()


def _sizes(options: CacheOptions, length: int, **places: Any) -> EngineSizes:
    room = DECODING_LEN + DECODED_LEN + 512
    return EngineSizes(
        max_model_len=max(length + 128, room), num_tokens=length + room,
        chunk_len=options.chunk_len, max_num_requests=4, places=places)


def _begin(engine: ShapeEngine, options: CacheOptions) -> Driver:
    engine.runner.compile_ahead(compile_steps(engine.plan.scheduler_config()))
    driver = Driver(engine, sparse=options.attention == "sparse")
    driver.prefill("first", min(4_096, engine.plan.config.max_model_len or 4_096) // 2, 7)
    driver.decode()
    return driver


def _measure_host(
    device: str, shape: Shape, options: CacheOptions, length: int,
) -> dict[str, Any]:
    block_bytes = plan_engine(shape, device, _sizes(options, length, kv_host_gib=1.0)
                              ).tiers.block_bytes
    host_gib = 1.02 * block_bytes * (length // 128 + 64) / GIB
    with open_engine(shape, device, _sizes(options, length, kv_host_gib=host_gib)) as engine:
        driver = _begin(engine, options)
        prefill_s, token, _ = driver.prefill("document", length, 2)
        driver.watch()
        begun_s = time.perf_counter()
        other = driver.add("other", length, 3)
        driver.turn_until(lambda: other.computed_len > 0 or other.num_pieces > 0
                          or other.num_in_flight > 0)
        save_s, save_pause_s = time.perf_counter() - begun_s, driver.longest_pause_s
        driver.cancel("other")
        driver.watch()
        ttft_s, again, request = driver.prefill("again", length, 2)
        pause_s, budget_s = driver.longest_pause_s, engine.plan.config.step_budget_s
        driver.end()
        synchronize(device)
    if again != token:
        raise CheckFailed(f"the token is {again} with KV from host memory, and was {token}")
    return {**_figures(prefill_s, ttft_s, request.origin, block_bytes),
            "save_s": rounded(save_s, 4), "save_pause_s": rounded(save_pause_s, 3),
            "pause_s": rounded(pause_s, 3), "step_budget_s": budget_s}


def _measure_disk(
    device: str, shape: Shape, options: CacheOptions, length: int,
) -> dict[str, Any]:
    folder = options.folder / f"{shape.name}-{length}"
    sizes = _sizes(options, length, kv_dir=str(folder))
    with open_engine(shape, device, sizes) as engine:
        driver = _begin(engine, options)
        driver.watch()
        prefill_s, token, _ = driver.prefill("document", length, 2)
        begun_s, write_pause_s = time.perf_counter(), driver.longest_pause_s
        driver.settle()
        write_rest_s = time.perf_counter() - begun_s
        driver.end()
        block_bytes = engine.plan.tiers.block_bytes
    files = sorted(folder.glob("*.safetensors"))
    read_s = _read(files)
    _forget(files)
    with open_engine(shape, device, sizes) as engine:
        driver = _begin(engine, options)
        driver.watch()
        ttft_s, again, request = driver.prefill("again", length, 2)
        pause_s, budget_s = driver.longest_pause_s, engine.plan.config.step_budget_s
        driver.end()
    num_bytes = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    if again != token:
        raise CheckFailed(f"the token is {again} with KV from disk, and was {token}")
    figures = _figures(prefill_s, ttft_s, request.origin, block_bytes)
    own_s = read_s * figures["gib"] * GIB / num_bytes
    return {**figures, "disk_own_s": rounded(own_s, 4), "write_rest_s": rounded(write_rest_s, 4),
            "over_disk_own": rounded(figures["load_s"] / own_s, 3),
            "write_pause_s": rounded(write_pause_s, 3), "pause_s": rounded(pause_s, 3),
            "step_budget_s": budget_s}


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


def _read(files: Sequence[Path]) -> float:
    """Time plain reading of the files, from the disk, seconds."""
    _forget(files)
    spans = [(file, start) for file in files for start in range(0, file.stat().st_size, READ_BYTES)]
    begun_s = time.perf_counter()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for _ in pool.map(_read_span, spans):
            pass
    return time.perf_counter() - begun_s


def _read_span(span: tuple[Path, int]) -> None:
    file, start = span
    fd = os.open(file, os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(READ_BYTES)], start)
    finally:
        os.close(fd)


def _forget(files: Sequence[Path]) -> None:
    """Take the files out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print what came back, how fast."""
    show_table("KV that comes back", (
        "shape", "from", "tokens", "GiB", "prefill", "loaded in", "GiB/s", "first token",
        "longest pause"), [
        (row["shape"], row["place"], f"{row['num_tokens']:,}", f"{row['gib']:.1f}",
         seconds(row["prefill_s"]), seconds(row["load_s"]), f"{row['gib_per_s']:.2f}",
         seconds(row["ttft_s"]), seconds(row["pause_s"])) for row in rows if "error" not in row])
