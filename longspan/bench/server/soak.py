"""A long run of mixed requests and hang-ups that looks for leaks: in KV blocks, memory, file
descriptors, threads and open requests. It also tells how much came back from host memory and disk.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from longspan.bench.server.server import Answer, Server, Usage, prompt_of
from longspan.commands.console import note
from longspan.errors import LongspanError

NUM_CLIENTS = 8
SAMPLE_PERIOD_S = 2.0
ABORT_SHARE = 0.3
"""The share of the requests whose client hangs up in the middle."""
MAX_TOKENS = 48
LOADED = "longspan_loaded_tokens_total"
MIB = 1024**2
ALLOWED_GROWTH = {"rss": 0.05, "fds": 0.1, "threads": 0.1}
"""Share by which the last third of a run may exceed the second one ..."""
ALLOWED_MORE = {"rss": 48.0, "fds": 6.0, "threads": 4.0}
"""... or so many (MiB for rss), whichever is more. The first third of a run does not count."""


@dataclass(slots=True)
class _Tally:
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_finished: int = 0
    num_aborted: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, answer: Answer, was_aborted: bool) -> None:
        with self.lock:
            if was_aborted:
                self.num_aborted += 1
            elif answer.error:
                self.failures.append(answer.error)
            else:
                self.num_finished += 1


def soak(server: Server, seconds: float, length: int) -> list[tuple[str, float, str]]:
    """Run for so long. Returns (metric, value, unit); ``leaks`` counts what grew.

    Args:
        length: of the longest prompts, tokens; most are far shorter.

    Raises `LongspanError` when requests or KV blocks are still held after all clients have left.
    """
    end_s = time.monotonic() + seconds
    tally, samples = _Tally(), list[Usage]()
    clients = [threading.Thread(target=_client, args=(server, seed, length, end_s, tally))
               for seed in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    while time.monotonic() < end_s:
        time.sleep(min(SAMPLE_PERIOD_S, max(0.0, end_s - time.monotonic())))
        samples.append(server.usage())
    for client in clients:
        client.join()
    server.wait_idle()
    found = growth(samples)
    leaks = [name for name, (before, after) in found.items() if is_leak(name, before, after)]
    for name in leaks:
        note(f"{name} grew from {found[name][0]:.0f} to {found[name][1]:.0f}")
    for failure in tally.failures[:5]:
        note(f"a request failed: {failure}")
    rows = [("seconds", seconds, "s"), ("finished", float(tally.num_finished), "requests"),
            ("aborted", float(tally.num_aborted), "requests"),
            ("failed", float(len(tally.failures)), "requests"),
            ("leaks", float(len(leaks) + bool(tally.failures)), "")]
    metrics = server.metrics()
    rows += [(f"loaded_from_{place}", metrics.get(f'{LOADED}{{place="{place}"}}', 0.0), "tokens")
             for place in ("host", "disk")]
    for name, (before, after) in found.items():
        rows += [(f"{name}_second_third", before, "MiB" if name == "rss" else ""),
                 (f"{name}_last_third", after, "MiB" if name == "rss" else "")]
    return rows


def write_pool(server: Server, length: int) -> None:
    """Let every KV block be written once: on CPUs memory is taken when that happens, and would pass
    for a leak."""
    capacity = int(server.metrics()["longspan_kv_capacity_tokens"])
    for number in range(-(-capacity // length) + 1):
        answer = server.complete(prompt_of(length, 1000 + number), 1)
        if answer.error:
            raise LongspanError(f"a request failed: {answer.error}")


def growth(samples: Sequence[Usage]) -> dict[str, tuple[float, float]]:
    """Return the medians over the second and over the last third of the run, by what is counted."""
    third = max(1, len(samples) // 3)
    parts = samples[-2 * third:-third] or samples, samples[-third:]

    def median(values: Sequence[float]) -> float:
        return sorted(values)[len(values) // 2]

    return {
        "rss": _pair([median([one.rss_bytes / MIB for one in part]) for part in parts]),
        "fds": _pair([median([float(one.num_fds) for one in part]) for part in parts]),
        "threads": _pair([median([float(one.num_threads) for one in part]) for part in parts])}


def is_leak(name: str, before: float, after: float) -> bool:
    """Say whether it grew by more than is allowed."""
    return after - before > max(ALLOWED_GROWTH[name] * before, ALLOWED_MORE[name])


def _pair(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[1]


def _client(server: Server, seed: int, length: int, end_s: float, tally: _Tally) -> None:
    """Send one request after the other. Of ten prompts nine are short, half continue a known
    text, and half of those have all of it: what a place keeps is long."""
    rng = random.Random(seed)
    known = prompt_of(length, seed)
    while time.monotonic() < end_s:
        num_tokens = rng.randrange(1, length if rng.random() < 0.1 else max(2, length // 32))
        prompt = known[:rng.choice([num_tokens, length])] if rng.random() < 0.5 else prompt_of(
            num_tokens, rng.randrange(1 << 30))
        leave_s = time.monotonic() + rng.expovariate(1.0) if rng.random() < ABORT_SHARE else None
        left = [False]

        def goes_on(answer: Answer, leave_s: float | None = leave_s,
                    left: list[bool] = left) -> bool:
            left[0] = leave_s is not None and time.monotonic() > leave_s
            return not left[0]

        answer = server.complete(prompt, rng.randrange(1, MAX_TOKENS), goes_on)
        tally.add(answer, left[0])
