"""A real server in processes of its own, and the clients that measure it over HTTP."""

from __future__ import annotations

import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from longspan.errors import LongspanError

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 3600.0
HEALTH_PERIOD_S = 0.05
LAG = "longspan_event_loop_lag_seconds"


FIRST_TOKEN_ID = 10
"""Smaller ids may be special."""
NUM_TOKEN_IDS = 200


def prompt_of(length: int, seed: int) -> list[int]:
    """Draw random tokens: no two prompts share a prefix."""
    rng = random.Random(seed)
    return [FIRST_TOKEN_ID + rng.randrange(NUM_TOKEN_IDS) for _ in range(length)]


def completion_body(prompt: str | Sequence[int], max_tokens: int) -> bytes:
    """Make a request for exactly ``max_tokens``, greedy and without penalties whatever the
    checkpoint advises. Writing a long one holds the interpreter, and with it all other clients of
    this process: a caller that measures what they wait for makes it beforehand."""
    return json.dumps({
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0,
        "repetition_penalty": 1, "stream": True,
        "return_progress": True, "stream_options": {"include_usage": True}}).encode()


@dataclass(slots=True)
class Answer:
    """One completion as its client saw it; times of ``time.monotonic``."""

    started_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    """When each token's event came."""
    cached_tokens: int = 0
    predicted_ttft_s: float | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Sending to first token. Raises `LongspanError` when there was none."""
        if not self.token_s:
            raise LongspanError(f"a request got no token: {self.error or 'it was cut off'}")
        return self.token_s[0] - self.started_s


class Server:
    """One running server. `running` makes it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def complete(
        self, prompt: str | Sequence[int], max_tokens: int,
        goes_on: Callable[[Answer], bool] = lambda answer: True,
    ) -> Answer:
        """Stream a completion of exactly ``max_tokens``: see `completion_body` and `send`."""
        return self.send(completion_body(prompt, max_tokens), goes_on)

    def send(
        self, body: bytes, goes_on: Callable[[Answer], bool] = lambda answer: True,
    ) -> Answer:
        """Stream a completion; hangs up once ``goes_on`` says no, which is asked at every event."""
        answer = Answer(started_s=time.monotonic())
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT_S)
        try:
            connection.request("POST", "/v1/completions", body, {
                "Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                answer.error = response.read(500).decode(errors="replace")
                return answer
            while line := response.readline():
                _note(answer, line)
                if not goes_on(answer):
                    break
        except (OSError, http.client.HTTPException) as error:
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        return answer

    def get(self, path: str) -> tuple[int, str]:
        """Get status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Return every sample of /metrics, by its name with labels."""
        rows = (line.rsplit(" ", 1) for line in self.get("/metrics")[1].splitlines()
                if line and not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    def wait_idle(self, timeout_s: float = 120.0) -> None:
        """Wait until no request is left. Raises `LongspanError` when some never end."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            found = self.metrics()
            if not found["longspan_open_requests"] and not found["longspan_kv_used_tokens"]:
                return
            time.sleep(0.2)
        raise LongspanError(
            f"{found['longspan_open_requests']:.0f} requests and "
            f"{found['longspan_kv_used_tokens']:.0f} tokens of KV are still held {timeout_s:.0f} s "
            "after the last client left")

    def usage(self) -> Usage:
        """Add up what the server's processes hold."""
        root = psutil.Process(self.process.pid)
        total = Usage()
        for process in [root, *root.children(recursive=True)]:
            try:
                with process.oneshot():
                    total.rss_bytes += process.memory_info().rss
                    total.num_fds += process.num_fds()
                    total.num_threads += process.num_threads()
            except psutil.NoSuchProcess:
                continue
        return total


@dataclass(slots=True)
class Usage:
    """What all processes of a server use."""

    rss_bytes: int = 0
    num_fds: int = 0
    num_threads: int = 0


@contextmanager
def running(model: str, options: Sequence[str]) -> Iterator[Server]:
    """Run `longspan serve` on a free port until the block ends; it must then stop in order.

    Args:
        options: of the command line, after the model.

    Raises `LongspanError` when it does not start, or ends with another status than 0.
    """
    command = [sys.executable, "-m", "longspan.cli", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = list[str]()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    try:
        yield Server(process, _wait_ready(process, lines))
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_TIMEOUT_S)
        if status:
            raise LongspanError(f"the server ended with status {status}: {' '.join(lines[-3:])}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join()
        if process.stderr is not None:
            process.stderr.close()


class HealthProbe:
    """Asks /health again and again, as a load balancer does. A context manager."""

    def __init__(self, server: Server) -> None:
        self.times_s = list[float]()
        self._server, self._is_over = server, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> HealthProbe:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(HEALTH_PERIOD_S):
            start_s = time.monotonic()
            status, _ = self._server.get("/health")
            # A refusal counts as the longest wait there is.
            self.times_s.append(time.monotonic() - start_s if status == 200 else 60.0)


def lag_quantile_s(before: dict[str, float], after: dict[str, float], share: float) -> float:
    """Return the upper bound of the event loop's lag at this quantile between two looks at
    /metrics: the end of the histogram's bucket, infinity in the last one."""
    buckets = sorted(
        (float(found[1]), after[name] - before.get(name, 0.0)) for name in after
        if (found := re.fullmatch(LAG + r'_bucket\{le="(.+)"\}', name)))
    total = buckets[-1][1] if buckets else 0.0
    return next((bound for bound, count in buckets if total and count >= share * total),
                float("inf"))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value with at least this share of all at or below it."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def _note(answer: Answer, line: bytes) -> None:
    if not line.startswith(b"data: {"):
        return
    event: dict[str, Any] = json.loads(line[6:])
    if "error" in event:
        answer.error = str(event["error"])
    if event.get("choices"):
        answer.token_s.append(time.monotonic())
    if event.get("usage"):
        details = event["usage"].get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens", 0)
    expected_ms = event.get("predicted_ttft_ms")
    if expected_ms is not None and answer.predicted_ttft_s is None:
        answer.predicted_ttft_s = expected_ms / 1000


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.strip())


def _wait_ready(process: subprocess.Popen[str], lines: list[str]) -> int:
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s and process.poll() is None:
        ports = [found[1] for line in list(lines)
                 if (found := re.search(r"listening on http://.*:(\d+)$", line))]
        if ports and any(line.startswith("serving ") for line in list(lines)):
            return int(ports[0])
        time.sleep(0.05)
    raise LongspanError(f"the server did not start: {' '.join(lines[-3:]) or 'it said nothing'}")
