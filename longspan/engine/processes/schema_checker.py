"""Checks JSON schemas in processes of their own, so that none holds up a server. No torch.

llguidance limits the size of a grammar, but not the work of getting there from a schema: two
kilobytes of nested ``allOf`` take gigabytes and minutes, and a call of the library cannot be
stopped. So a child process that has read the vocabulary forks for each schema; the fork's
processor time and memory are limited, and it ends when its request is cancelled. A schema that
passes is compiled once more where tokens are sampled, at the same price.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

from longspan.engine.processes.spawning import python_command
from longspan.engine.text.grammar import NUM_KEPT, Grammars
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import InvalidRequestError, LongspanError, MissingDependencyError

MAX_COMPILE_S = 0.5
"""Processor time for one schema. Ordinary ones take some milliseconds; 64 KiB of them, 0.3 s."""
MAX_COMPILE_BYTES = 256 * 1024**2
"""Memory for one schema, beside the vocabulary."""
NUM_AT_ONCE = 4
WATCH_S = 0.01
NICENESS = 5
"""The runner comes first where processors are few."""
TOO_SLOW = (f"json_schema cannot be followed: compiling it takes more than {MAX_COMPILE_S:g} s of "
            "processor time; make it simpler")
TOO_LARGE = (f"json_schema cannot be followed: compiling it takes more than "
             f"{MAX_COMPILE_BYTES // 1024**2} MiB of memory; make it simpler")
PASSED = "passed"
ERRORS = {kind.__name__: kind
          for kind in (InvalidRequestError, MissingDependencyError, LongspanError)}


class SchemaChecker:
    """Checks schemas for one checkpoint. The child starts with the first one. All methods belong to
    one event loop.

    Args:
        path: the checkpoint's directory.
        vocab_size: number of the model's logits; the tokenizer may know fewer tokens.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._arguments = ("longspan-schemas", str(path), str(vocab_size))
        self._replies: OrderedDict[str, str] = OrderedDict()
        self._slots = asyncio.Semaphore(NUM_AT_ONCE)
        self._starting = asyncio.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def check(self, json_schema: str) -> None:
        """Check one schema. Cancelling this call ends the work.

        Raises:
            InvalidRequestError: the schema cannot be followed, or takes too much to compile.
            MissingDependencyError: llguidance is not installed.
            LongspanError: the checkpoint's tokenizer does not suit.
        """
        reply = self._replies.get(json_schema)
        if reply is None:
            reply = await self._ask(_encode(json_schema))
            self._replies[json_schema] = reply
            while len(self._replies) > NUM_KEPT:
                self._replies.popitem(last=False)
        if reply != PASSED:
            kind, _, message = reply.partition(":")
            raise ERRORS[kind](message)

    def close(self) -> None:
        """End the child. Its forks end with the calls that wait for them."""
        if self._control is not None:
            self._control.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    async def _ask(self, schema: bytes) -> str:
        await self._slots.acquire()
        ours, theirs = socket.socketpair()
        # The task outlives a cancelled call, for its slot is free only when the fork has ended.
        task = asyncio.create_task(self._exchange(schema, ours, theirs))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                ours.shutdown(socket.SHUT_WR)
            raise

    async def _exchange(self, schema: bytes, ours: socket.socket, theirs: socket.socket) -> str:
        loop, reply = asyncio.get_running_loop(), bytearray()
        try:
            with ours:
                with theirs:
                    socket.send_fds(await self._ready(), [b"\0"], [theirs.fileno()])
                ours.setblocking(False)
                with contextlib.suppress(ConnectionError):  # the fork ended early
                    await loop.sock_sendall(ours, struct.pack("!I", len(schema)) + schema)
                    while received := await loop.sock_recv(ours, 4096):
                        reply += received
        finally:
            self._slots.release()
        return reply.decode() or f"{InvalidRequestError.__name__}:{TOO_LARGE}"

    async def _ready(self) -> socket.socket:
        """Return the socket of a child that has read the vocabulary; start one if need be."""
        async with self._starting:
            if self._child is None or self._child.poll() is not None:
                self.close()
                control = self._control = self._spawn()
                if not await asyncio.get_running_loop().sock_recv(control, 1):
                    raise RuntimeError("the process that checks JSON schemas does not start")
            assert self._control is not None
            return self._control

    def _spawn(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                python_command(__name__, *self._arguments), stdin=theirs.fileno(),
                start_new_session=True)
        ours.setblocking(False)
        return ours


def _encode(json_schema: str) -> bytes:
    try:
        return json_schema.encode()
    except UnicodeEncodeError:  # lone surrogates
        raise InvalidRequestError("json_schema is not valid Unicode text") from None


# -- in the child ----------------------------------------------------------------------------------


def main() -> None:
    """Run the child until the other end of its standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    os.nice(NICENESS)
    _, path, vocab_size = sys.argv[1:]
    grammars = Grammars(Tokenizer(Path(path)), int(vocab_size))
    with contextlib.suppress(LongspanError):  # each check will say so
        grammars.load()
    control = socket.socket(fileno=0)
    control.sendall(b"\0")
    while fds := socket.recv_fds(control, 1, 1)[1]:
        with socket.socket(fileno=fds[0]) as connection:
            if os.fork() == 0:
                try:
                    control.close()
                    _answer(grammars, connection)
                finally:
                    os._exit(0)


def _answer(grammars: Grammars, connection: socket.socket) -> None:
    """Compile one schema, within the limits. Ends the process."""
    (length,) = struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))
    schema = connection.recv(length, socket.MSG_WAITALL).decode()
    replying = threading.Lock()
    threading.Thread(target=_watch, args=(connection, replying), daemon=True).start()
    _limit()
    try:
        grammars.check(schema)
        reply = PASSED
    except LongspanError as error:
        reply = f"{type(error).__name__}:{error}"
    _reply(connection, replying, reply)


def _watch(connection: socket.socket, replying: threading.Lock) -> None:
    """End the process when its time is up, or when its request is cancelled."""
    while time.process_time() < MAX_COMPILE_S:
        if select.select([connection], [], [], WATCH_S)[0]:
            os._exit(0)
    _reply(connection, replying, f"{InvalidRequestError.__name__}:{TOO_SLOW}")


def _reply(connection: socket.socket, replying: threading.Lock, reply: str) -> None:
    """Reply and end the process, so that it never replies twice."""
    with replying:
        connection.sendall(reply.encode())
        os._exit(0)


def _limit() -> None:
    """Limit memory and processor time. Without memory the library aborts and writes to standard
    error, which is dropped."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if sys.platform == "linux":  # others do not keep this limit
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        num_bytes = num_pages * resource.getpagesize() + MAX_COMPILE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    # The kernel counts whole seconds; its limit holds where the watch does not get its turn.
    num_s = int(MAX_COMPILE_S) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (num_s, num_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
