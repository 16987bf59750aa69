"""`longspan bench serve`: what a server's users feel, measured over HTTP on a real server.

- ``prefill``: while one long prompt is read, how long short requests wait, how long a running
  answer pauses, how fast /health answers, how late the front end's event loop is;
- ``followup``: two further questions on one document, against the first;
- ``decode``: tokens a second with steps run ahead (TAG) and without
  (`longspan.bench.server.run_ahead`);
- ``crowd``: how long a running answer pauses beside thousands of idle connections and schemas that
  want to do harm (`longspan.bench.server.crowd`).

`longspan.bench.server.soak` holds the long run that looks for leaks.
"""

from __future__ import annotations

import math
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from longspan.bench.server.crowd import crowd
from longspan.bench.server.hostile_schemas import HOSTILE
from longspan.bench.server.run_ahead import measure_decode
from longspan.bench.server.server import (
    Answer,
    HealthProbe,
    Server,
    completion_body,
    lag_quantile_s,
    prompt_of,
    quantile,
    running,
)
from longspan.bench.server.soak import soak, write_pool
from longspan.commands.console import note, show_table
from longspan.commands.results import describe_run, make_folder, write_rows
from longspan.config import EngineConfig, WeightSource
from longspan.engine.resolve import STEP_BUDGET_S, resolve_device
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.errors import LongspanError
from longspan.units import GIB

SHORT_LEN = 100
SHORT_PERIOD_S = 2.0
"""Longest time between two short requests, or two budgets where that is more."""
ROOM = 4_096
"""Tokens of the longest context beyond the long prompt."""
STREAM_PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
"""Goes on in plain words: a token that is part of a character has no event of its own, and would
look like a pause."""
NUM_FOLLOW_UPS = 2
NUM_IDLE = 2_000
"""Connections of a crowd that say nothing."""
SOAK_LEN_CPU = 4_096
"""Longest prompts of a soak on CPUs: the pool is written once before growth counts, in seconds."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeJob:
    """What was asked for on the command line."""

    model: str
    scenarios: tuple[str, ...]
    length: int
    budget_s: float | None
    batches: tuple[int, ...]
    soak_s: float
    device: str
    threads: int | None
    out: Path
    weights: str = "checkpoint"
    """As `longspan serve --weights`."""
    commit: str | None = None
    """Where the source is a copy without git."""

    def __post_init__(self) -> None:
        if self.budget_s is not None and not 0 < self.budget_s < math.inf:
            raise LongspanError(f"--budget-s must be positive and finite, not {self.budget_s}")
        if not 0 <= self.soak_s < math.inf:
            raise LongspanError(f"--soak must be 0 or a number of seconds, not {self.soak_s}")


def run(job: ServeJob) -> bool:
    """Measure, print, and write rows after each scenario. False: a soak has found a leak."""
    unknown = set(job.scenarios) - set(SCENARIOS)
    if unknown:
        raise LongspanError(f"--scenario: {sorted(unknown)[0]!r} is not one of "
                            f"{', '.join(SCENARIOS)}")
    resolve_device(job.device, has_cuda=torch.cuda.is_available())
    make_folder(job.out)
    about, found, file = describe_run(job.device, job.commit), list[Row](), None
    model = f"{job.model} ({job.weights} weights)" if job.weights != "checkpoint" else job.model
    wanted = list(job.scenarios) if not job.soak_s else ["soak"]
    for scenario in wanted:
        note(f"measuring {scenario}")
        rows = [{"scenario": scenario, "model": model, **row}
                for row in (SCENARIOS | {"soak": _soak})[scenario](job)]
        found += rows
        file = write_rows(job.out, "serve", rows, job.device, about=about)
    show_table(f"serving {model}", ("scenario", "metric", "value", "unit"), [
        (row["scenario"], row["metric"], f"{row['value']:,.4g}", row["unit"]) for row in found])
    note(f"rows in {file}")
    return not any(row["metric"] == "leaks" and row["value"] for row in found)


SOAK_CHUNK_LEN, SOAK_REQUESTS = 1_024, 8
SOAK_PLACES = ("--kv-host-gib", "0.1", "--kv-disk-gib", "1")
"""KV goes to host memory and to a folder as well in a soak, and both are full soon."""


def soak_options(job: ServeJob, length: int, folder: str) -> list[str]:
    """Return the options of a soak's server: little room on the device, so that much of what is
    known comes back from the other places."""
    options = server_options(job, length)
    plan = ResolvedEngine.resolve(EngineConfig(
        model=job.model, device=job.device, weights=cast(WeightSource, job.weights),
        max_model_len=length + ROOM, prefill_chunk_len=SOAK_CHUNK_LEN,
        max_num_requests=SOAK_REQUESTS)).memory
    num_bytes = plan.weights_bytes + plan.workspace_bytes + 1.3 * plan.context_bytes
    return [*options, "--memory-gib", f"{num_bytes / GIB:.3f}", "--prefill-chunk-len",
            f"{SOAK_CHUNK_LEN}", "--max-num-requests", f"{SOAK_REQUESTS}", *SOAK_PLACES,
            "--kv-dir", folder]


def server_options(job: ServeJob, length: int | None = None) -> list[str]:
    """Return the options of `longspan serve` for prompts of this length."""
    longest = max(length or job.length, len(STREAM_PROMPT))  # a token is a character or more
    options = ["--device", job.device, "--max-model-len", str(longest + ROOM),
               "--step-budget-s", str(budget_s(job)), "--weights", job.weights]
    return options if job.threads is None else [*options, "--threads", str(job.threads)]


def budget_s(job: ServeJob) -> float:
    """Return the budget of a step, seconds."""
    return job.budget_s or STEP_BUDGET_S[job.device.split(":")[0]]


# -- prefill ---------------------------------------------------------------------------------------


def _prefill(job: ServeJob) -> list[Row]:
    bodies = (completion_body(STREAM_PROMPT, ROOM - 2 * SHORT_LEN),
              completion_body(prompt_of(job.length, 2), 1))
    with running(job.model, server_options(job)) as server:
        before = server.metrics()
        with HealthProbe(server) as health:
            stream, long, shorts = _beside_a_long_prompt(server, job, *bodies)
        after = server.metrics()
    begin_s, end_s = long.started_s, long.token_s[0]
    budget, waits_s = budget_s(job), [short.ttft_s for short in shorts]
    pause_s = longest_pause_s(stream.token_s, begin_s, end_s)
    rows = [
        ("step_budget", budget, "s"), ("long_ttft", long.ttft_s, "s"),
        ("short_requests", float(len(shorts)), ""),
        ("short_ttft_median", quantile(waits_s, 0.5), "s"),
        ("short_ttft_max", max(waits_s), "s"),
        ("short_ttft_max_budgets", max(waits_s) / budget, "budgets"),
        ("decode_pause_max", pause_s, "s"), ("decode_pause_max_budgets", pause_s / budget,
                                             "budgets"),
        ("health_p99", 1e3 * quantile(health.times_s, 0.99), "ms"),
        ("health_max", 1e3 * max(health.times_s), "ms"),
        ("loop_lag_p99_below", 1e3 * lag_quantile_s(before, after, 0.99), "ms")]
    if long.predicted_ttft_s is not None:
        rows.append(("long_ttft_predicted_ratio", long.predicted_ttft_s / long.ttft_s, ""))
    return [_row(job, *row) for row in rows]


def _beside_a_long_prompt(
    server: Server, job: ServeJob, stream_body: bytes, long_body: bytes,
) -> tuple[Answer, Answer, list[Answer]]:
    """Return a running answer, the long prompt's, and those of short requests sent meanwhile."""
    answers = dict[str, Answer]()
    has_begun, is_over = threading.Event(), threading.Event()

    def watch(answer: Answer) -> bool:
        if answer.token_s:
            has_begun.set()
        return not is_over.is_set()

    def ask(name: str, body: bytes, *goes_on: Any) -> None:
        answers[name] = server.send(body, *goes_on)
        has_begun.set()

    stream = threading.Thread(target=ask, args=("stream", stream_body, watch))
    long = threading.Thread(target=ask, args=("long", long_body))
    stream.start()
    has_begun.wait()
    long.start()
    shorts = list[Answer]()
    try:
        time.sleep(min(1.0, budget_s(job)))
        while long.is_alive():
            shorts.append(server.complete(prompt_of(SHORT_LEN, 3 + len(shorts)), 1))
            long.join(max(SHORT_PERIOD_S, 2 * budget_s(job)) * random.Random(len(shorts)).random())
    finally:
        is_over.set()
        long.join()
        stream.join()
    _require(answers["stream"], "the running stream")
    _require(answers["long"], "the long request")
    if not shorts:
        raise LongspanError(f"{job.length:,} tokens were read before a short request could be sent;"
                            " use a longer --length")
    return answers["stream"], answers["long"], shorts


def longest_pause_s(token_s: Sequence[float], begin_s: float, end_s: float) -> float:
    """Return the longest time without a token that overlaps the span. Raises `LongspanError` for an
    answer that ended before, which could not have paused."""
    if not token_s or token_s[-1] < end_s:
        raise LongspanError("the running stream ended before the long prompt was read; "
                            "use a shorter --length")
    inside = [time_s for time_s in token_s if begin_s <= time_s <= end_s]
    before = max((time_s for time_s in token_s if time_s < begin_s), default=begin_s)
    after = min(time_s for time_s in token_s if time_s >= end_s)
    points = [before, *inside, after]
    return max(right - left for left, right in zip(points, points[1:], strict=False))


def _require(answer: Answer, what: str) -> None:
    if answer.error or not answer.token_s:
        raise LongspanError(f"{what} failed: {answer.error or 'it got no token'}")


# -- follow-up questions ---------------------------------------------------------------------------


def _follow_up(job: ServeJob) -> list[Row]:
    with running(job.model, server_options(job)) as server:  # which knows whether it can be so long
        document = prompt_of(job.length, 4)
        first = server.complete([*document, *prompt_of(SHORT_LEN, 5)], 1)
        others = [server.complete([*document, *prompt_of(SHORT_LEN + 7 * index, 6 + index)], 1)
                  for index in range(NUM_FOLLOW_UPS)]
    rows = [("first_ttft", first.ttft_s, "s")]
    for index, answer in enumerate(others, 1):
        rows += [(f"followup_{index}_ttft", answer.ttft_s, "s"),
                 (f"followup_{index}_share", 100 * answer.ttft_s / first.ttft_s, "%"),
                 (f"followup_{index}_cached_tokens", float(answer.cached_tokens), "tokens")]
    return [_row(job, *row) for row in rows]


# -- crowd -----------------------------------------------------------------------------------------


def _crowd(job: ServeJob) -> list[Row]:
    with running(job.model, server_options(job)) as server:
        found = crowd(server, completion_body(STREAM_PROMPT, job.length), HOSTILE, NUM_IDLE)
    pause_s = longest_pause_s(found.stream.token_s, found.begin_s, found.end_s)
    rows = [
        ("step_budget", budget_s(job), "s"), ("idle_connections", float(found.num_idle), ""),
        ("hostile_schemas", float(len(found.statuses)), ""),
        ("hostile_schemas_refused", float(sum(status == 400 for status in found.statuses)), ""),
        ("hostile_schemas_other_errors",
         float(sum(status not in (200, 400) for status in found.statuses)), ""),
        ("crowd_seconds", found.end_s - found.begin_s, "s"),
        ("decode_pause_max_alone",
         longest_pause_s(found.stream.token_s, found.alone_s, found.begin_s), "s"),
        ("decode_pause_max", pause_s, "s"),
        ("decode_pause_max_budgets", pause_s / budget_s(job), "budgets"),
        ("health_max", 1e3 * max(found.health_s), "ms")]
    return [_row(job, *row) for row in rows]


# -- decode, soak ----------------------------------------------------------------------------------


def _decode(job: ServeJob) -> list[Row]:
    return [_row(job, *row) for row in measure_decode(
        EngineConfig(model=job.model, device=job.device, num_threads=job.threads,
                     weights=cast(WeightSource, job.weights)), job.batches)]


def _soak(job: ServeJob) -> list[Row]:
    length = min(job.length, SOAK_LEN_CPU) if job.device == "cpu" else job.length
    with tempfile.TemporaryDirectory(prefix="longspan-soak-") as folder, running(
            job.model, soak_options(job, length, folder)) as server:
        if job.device == "cpu":
            write_pool(server, length)
        return [{**_row(job, *row), "length": length}
                for row in soak(server, job.soak_s, length)]


def _row(job: ServeJob, metric: str, value: float, unit: str) -> Row:
    return {"metric": metric, "value": round(value, 6), "unit": unit, "length": job.length}


SCENARIOS: dict[str, Callable[[ServeJob], list[Row]]] = {
    "prefill": _prefill, "followup": _follow_up, "decode": _decode, "crowd": _crowd}
