"""Thousands of idle connections and hostile schemas beside a running answer, over HTTP."""

from __future__ import annotations

import http.client
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psutil

from longspan.bench.server.server import Answer, HealthProbe, Server
from longspan.errors import LongspanError

NUM_SENDERS = 8
"""Hostile schemas on their way at once."""
ALONE_S = 2.0
"""Time of the answer before the crowd comes, for comparison."""
ACCEPT_S = 5.0
"""Longest wait until the server has taken the connections."""
OTHER_FILES = 256
"""Descriptors of this process besides the idle connections."""
REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Crowd:
    """What the crowd was, and the answer that ran beside it; times of ``time.monotonic``."""

    stream: Answer
    alone_s: float
    begin_s: float
    end_s: float
    num_idle: int
    """Connections that were open together, as the server counts its descriptors."""
    statuses: tuple[int, ...]
    """HTTP statuses of the requests with schemas."""
    health_s: tuple[float, ...]


def crowd(
    server: Server, stream_body: bytes, schemas: Sequence[str], num_idle: int
) -> Crowd:
    """Let an answer run; open connections that say nothing, and send every schema once.

    Args:
        stream_body: of a completion that takes longer than all of this; it is hung up on.
        schemas: JSON texts, or what a stranger sends in their place.

    Raises `LongspanError` when descriptors do not suffice, or the answer fails.
    """
    allow_files(num_idle + OTHER_FILES)
    with _answer_running(server, stream_body) as stream, HealthProbe(server) as health, \
            ExitStack() as stack:
        alone_s = time.monotonic()
        time.sleep(ALONE_S)
        front = psutil.Process(server.process.pid)
        begin_s, before = time.monotonic(), front.num_fds()
        for _ in range(num_idle):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
        count = _accepted(front, before, num_idle)
        with ThreadPoolExecutor(NUM_SENDERS) as pool:
            statuses = tuple(pool.map(lambda schema: _send(server, schema), schemas))
        end_s = time.monotonic()
        while stream.token_s[-1] < end_s and not stream.error:
            time.sleep(0.01)
            if time.monotonic() > end_s + REQUEST_TIMEOUT_S:
                raise LongspanError("the running answer stands still")
    if stream.error:
        raise LongspanError(f"the running answer failed: {stream.error}")
    return Crowd(stream=stream, alone_s=alone_s, begin_s=begin_s, end_s=end_s, num_idle=count,
                 statuses=statuses, health_s=tuple(health.times_s))


def allow_files(wanted: int) -> None:
    """Raise this process' limit of descriptors. Raises `LongspanError` if it may not be so high."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise LongspanError(f"{wanted:,} descriptors are needed and {hard:,} allowed; raise the "
                            "limit of this user (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _accepted(front: psutil.Process, before: int, wanted: int) -> int:
    """Wait a while for the server to take the connections; returns how many it has."""
    count, end_s = 0, time.monotonic() + ACCEPT_S
    while count < wanted and time.monotonic() < end_s:
        count = max(count, front.num_fds() - before)
        time.sleep(0.01)
    return count


@contextmanager
def _answer_running(server: Server, body: bytes) -> Iterator[Answer]:
    """Give an answer that has begun and goes on until the end of the block."""
    found, has_begun, is_over = list[Answer](), threading.Event(), threading.Event()

    def watch(answer: Answer) -> bool:
        found[:] = [answer]
        if answer.token_s:
            has_begun.set()
        return not is_over.is_set()

    def run() -> None:
        found[:] = [server.send(body, watch)]
        if not is_over.is_set() and not found[0].error:
            found[0].error = "it ended before the crowd had gone; use a longer --length"
        has_begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        has_begun.wait()
        if found[0].error:
            raise LongspanError(f"the running answer failed: {found[0].error}")
        yield found[0]
    finally:
        is_over.set()
        thread.join()


def _send(server: Server, schema: str) -> int:
    """Ask for an answer that fits it; returns the HTTP status."""
    body = ('{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "response_format": '
            f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}}}')
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/chat/completions", body.encode(), {
            "Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException) as error:
        raise LongspanError(f"a schema got no reply: {type(error).__name__}: {error}") from None
    finally:
        connection.close()
