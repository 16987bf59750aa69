"""`longspan serve`: bind, load, report, serve until told to stop, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from longspan import garbage
from longspan.config import EngineConfig
from longspan.engine.front import client
from longspan.engine.front.client import AsyncEngine, EngineStatus
from longspan.errors import LongspanError
from longspan.serve.admission import Gate
from longspan.serve.app import create_app
from longspan.serve.body import cancel
from longspan.serve.config import ServeConfig
from longspan.serve.connection import MAX_HEAD_BYTES, Connection, Limit
from longspan.serve.logs import set_up
from longspan.units import in_gib

POLL_S = 0.1
SWITCH_S = 5e-4
"""Longest that a helper thread keeps the interpreter from the event loop."""
WARM_UP_S = 60.0
"""Longest wait for the engine's warm-up before the report is printed without predictions."""
LAST_WORDS_S = 5.0
"""Time for streams to send their error after the engine's death, and for cancelled ones to end."""
WRITE_S = 60.0
"""Longest wait at the end until the KV of finished prefill chunks is on disk."""
BACKLOG = 128
"""Connections that the event loop accepts at a time."""
OTHER_FILES = 128
"""Descriptors for everything else: sockets of the engine, forks, libraries."""
REPORT_LENGTHS = (131_072, 262_144, 524_288, 1_048_576)


def serve(model: str, config: ServeConfig, engine_options: Mapping[str, Any]) -> int:
    """Serve a model until SIGTERM or SIGINT; returns the exit status.

    Args:
        engine_options: the other fields of `EngineConfig`.

    Raises `LongspanError` when the port is taken, the engine's sockets cannot be made, or the
    model cannot be loaded.
    """
    engine = EngineConfig(model=model, **engine_options)
    if engine.step_budget_s == math.inf:
        raise LongspanError("step_budget_s must be finite; 1e6 is long enough for every step")
    sys.setswitchinterval(SWITCH_S)
    return run(client.AsyncEngine(engine), config)


def run(engine: AsyncEngine, config: ServeConfig) -> int:
    """Serve an engine; 0 after an orderly end, 1 if the engine died or requests were cut off."""
    set_up(has_access_log=config.access_log)
    with listen(config) as sock:
        return asyncio.run(_run(engine, config, sock))


def listen(config: ServeConfig) -> socket.socket:
    """Bind the socket before anything is loaded. Raises `LongspanError` if it cannot be bound."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        # resolved first: create_server leaks a socket for a name that does not resolve
        socket.getaddrinfo(config.host, config.port, family, socket.SOCK_STREAM)
        sock = socket.create_server((config.host, config.port), family=family, backlog=1024)
    except socket.gaierror as error:
        raise _no_socket(config, error.strerror or str(error)) from None
    except UnicodeError:
        raise _no_socket(config, "that is no name of a host") from None
    except OSError as error:
        raise _no_socket(config, os.strerror(error.errno) if error.errno else str(error)) from None
    # asyncio leaves Nagle's algorithm on for sockets it did not make: 40 ms on most replies
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _no_socket(config: ServeConfig, reason: str) -> LongspanError:
    return LongspanError(f"cannot listen on {config.host} port {config.port}: {reason}; "
                         "choose another with --host and --port")


class Server(uvicorn.Server):
    """A uvicorn server that ends in order at the first signal and at once at the second. It handles
    signals from before the engine is started until it is closed."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_stopping = False

    def watch_signals(self) -> None:
        """Handle signals from now on, on the running event loop."""
        if threading.current_thread() is threading.main_thread():
            for sig in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(sig, self.handle_exit, sig, None)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: uvicorn would handle signals only while it serves."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM."""
        if self.is_stopping:
            self.should_exit = self.force_exit = True
            # Tasks that uvicorn leaves unfinished by that are not errors to report.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.is_stopping = True


async def _run(engine: AsyncEngine, config: ServeConfig, sock: socket.socket) -> int:
    app = create_app(engine, config)
    server = Server(uvicorn.Config(
        app, log_config=None, access_log=False, loop="asyncio", ws="none",
        http=partial(Connection, head_timeout_s=config.head_timeout_s,  # type: ignore[arg-type]
                     limit=Limit(most_connections(config.max_connections))), backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES, timeout_keep_alive=30,
        timeout_graceful_shutdown=int(LAST_WORDS_S), server_header=False))
    server.watch_signals()
    try:
        await _start(engine)
        _announce(config, sock)
        supervisor = asyncio.create_task(
            _supervise(server, engine, app.state.service.gate, config))
        try:
            await server.serve([sock])
            if not server.should_exit:
                return 1  # uvicorn could not start, and has said why
            return await supervisor
        finally:
            await cancel(supervisor)
    finally:
        await engine.close()


def most_connections(wanted: int) -> int:
    """Return how many connections the system's limit of descriptors allows, ``wanted`` at most.
    Raises that limit as far as this user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - BACKLOG - OTHER_FILES))


async def _start(engine: AsyncEngine) -> None:
    """Start the engine. Raises `LongspanError` when processes or their sockets cannot be made."""
    try:
        await engine.start()
    except OSError as error:
        raise LongspanError(f"cannot start the engine's processes: {error.strerror or error}; free "
                            "some memory, or raise the limits of this user (ulimit -a)") from None


async def _supervise(server: Server, engine: AsyncEngine, gate: Gate, config: ServeConfig) -> int:
    """Watches state and signals; ends the server. Returns the exit status.

    Raises `LongspanError` when loading fails for a reason that a person can mend.
    """
    try:
        while engine.status().state == "loading" and not server.is_stopping:
            await asyncio.sleep(POLL_S)
        if engine.status().state == "dead" and engine.status().is_mendable:
            raise LongspanError(engine.status().reason)
        await _until_measured(server, engine)
        garbage.freeze()
        if engine.status().state == "ready":
            _note(start_up_report(engine.status()))
        while engine.status().state != "dead" and not server.is_stopping:
            await asyncio.sleep(POLL_S)
        if engine.status().state == "dead":
            return await _mourn(engine, gate)
        return await _drain(server, engine, gate, config)
    finally:
        server.should_exit = True


async def _until_measured(server: Server, engine: AsyncEngine) -> None:
    """Wait until the engine's first steps, its own or a request's, have measured its speed."""
    end_s = asyncio.get_running_loop().time() + WARM_UP_S
    while engine.status().state == "ready" and engine.status().latency is None and \
            asyncio.get_running_loop().time() < end_s and not server.is_stopping:
        await asyncio.sleep(POLL_S)


async def _mourn(engine: AsyncEngine, gate: Gate) -> int:
    """Let every stream say that the engine died."""
    _note(f"error: the engine has stopped: {engine.status().reason or 'no reason is known'}")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(gate.wait_idle(), LAST_WORDS_S)
    return 1


async def _drain(server: Server, engine: AsyncEngine, gate: Gate, config: ServeConfig) -> int:
    """Refuse new requests, finish those accepted."""
    gate.is_draining = True
    _note(f"stopping: {gate.num_open} requests to finish, at most {config.drain_timeout_s:g} s; "
          "a second signal cuts them off")
    finished = asyncio.create_task(_finish(engine, gate))
    end_s = asyncio.get_running_loop().time() + config.drain_timeout_s
    while not finished.done() and not server.force_exit and \
            asyncio.get_running_loop().time() < end_s and engine.status().state != "dead":
        await asyncio.wait((finished,), timeout=POLL_S)
    is_finished = finished.done() and finished.exception() is None
    await cancel(finished)
    num_cut = gate.num_open
    if not server.force_exit:
        await _write_rest(server, engine)
    _note("stopped" if is_finished else f"stopped; {num_cut} requests were cut off")
    return 0 if is_finished else 1


async def _write_rest(server: Server, engine: AsyncEngine) -> None:
    """Wait until what is finished of all prompts is on disk, where it goes there."""
    engine.cut_off()
    is_told, end_s = False, asyncio.get_running_loop().time() + WRITE_S
    while (status := engine.status()).keeps_on_disk and (
            status.num_unwritten_tokens or status.num_running or status.num_waiting):
        if status.num_unwritten_tokens and not is_told:
            _note(f"writing {status.num_unwritten_tokens:,} tokens of KV to disk, at most "
                  f"{WRITE_S:g} s; a second signal leaves out the rest")
            is_told = True
        if status.state == "dead" or server.force_exit or \
                asyncio.get_running_loop().time() > end_s:
            _note(f"{status.num_unwritten_tokens:,} tokens of KV are not on disk, and will be "
                  "computed again")
            return
        await asyncio.sleep(POLL_S)


async def _finish(engine: AsyncEngine, gate: Gate) -> None:
    await gate.wait_idle()
    await engine.drain()


def start_up_report(status: EngineStatus) -> str:
    """Describe what this server can do, in a few lines."""
    lines = [f"serving {status.model}",
             f"  longest prompt and answer  {status.max_model_len:>12,} tokens",
             f"  KV cache                   {status.capacity_tokens:>12,} tokens"]
    if status.ranks:
        lines.append(f"  ranks                      {status.ranks}")
    lines += [f"  {name:<26} {in_gib(size):>16}"
              for name, size in status.memory_bytes.items()]
    lines += [f"  prefill chunk              {status.prefill_chunk_len:>12,} tokens",
              f"  requests together          {status.max_num_requests:>12,}"]
    if status.sizes_reason:
        lines.append(f"    because {status.sizes_reason}")
    lengths = [length for length in REPORT_LENGTHS if length <= status.max_model_len]
    if status.latency and lengths:
        times = [status.latency.prefill_s(0, length) for length in lengths]
        lines.append("  first token, a guess       " + ", ".join(
            f"{length // 1024}K: {_about(seconds)}"
            for length, seconds in zip(lengths, times, strict=True)))
        lines.append("  (from prompts of a thousand tokens or so; long ones will tell better, and "
                     "the first of each kind waits for what is prepared then)")
    return "\n".join(lines)


def _about(seconds: float) -> str:
    """Write a guess with the digits that it deserves."""
    if seconds < 90:
        return f"about {seconds:.2g} s"
    return f"about {seconds / 60:.0f} min"


def _announce(config: ServeConfig, sock: socket.socket) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    _note(f"listening on http://{host}:{sock.getsockname()[1]}")
    if config.is_public and not config.api_keys:
        _note("warning: other machines can use this server, and no API key is set")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
