"""An engine in processes: started, watched and ended from the front end's process. No torch.

A child reads its orders from the first line of its standard input. That pipe is also its lifeline:
when the parent closes it or is gone, in whatever way, the child ends at once. Children ignore
SIGINT and SIGTERM, which a terminal or a service manager sends to the whole group: the parent
decides when its children end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq

from longspan.config import EngineConfig
from longspan.engine.processes.backend import Send, Start
from longspan.engine.processes.child_orders import ROLES, Orders, Role, socket_address
from longspan.engine.processes.sockets import Inbox, Outbox
from longspan.engine.processes.spawning import first_line, private_directory, python_command
from longspan.engine.processes.wire import Begin, Command, Died, FromEngine, Prepare
from longspan.errors import LongspanError

LOADER = "longspan.engine.setup.load:load_engine"
MAX_IN_FLIGHT = 2
"""Steps: one that is computed, and the next one, so that the runner never waits. There may be more
short ones (`longspan.engine.control.loop.Loop`)."""
POLL_S = 0.1
LAST_WORDS_S = 1.0
"""Longest wait after a child's end for the message in which it explains itself."""
STOP_S = 2.0
"""Time that a child has to end when its lifeline is cut; then it is killed."""


def in_processes(*, max_in_flight: int = MAX_IN_FLIGHT, loader: str = LOADER) -> Start:
    """Start engines in processes of their own.

    Args:
        max_in_flight: steps. 1 waits for each step's result before the next one is scheduled; it is
            the synchronous baseline that benchmarks compare with.
        loader: ``module:function`` of a `longspan.engine.processes.backend.Loader`; tests name
            doubles.
    """
    return lambda config, send: Processes(config, send, max_in_flight, loader)


class Processes:
    """Scheduler and runner of one engine. ``send`` is called on threads of this object.

    Raises `LongspanError` when there is no place for the sockets; nothing is left then.
    """

    def __init__(
        self, config: EngineConfig, send: Send, max_in_flight: int, loader: str,
    ) -> None:
        self._post = send
        self._directory = private_directory()
        self._is_stopping = threading.Event()
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._inbox = Inbox(self._context, socket_address(self._directory, "front"), FromEngine)
        except LongspanError:
            self._context.term()
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        self._scheduler = Outbox(self._context, socket_address(self._directory, "scheduler"))
        self._grammars = Outbox(self._context, socket_address(self._directory, "grammars"))
        self.children = {role: _spawn(Orders(
            role=role, directory=self._directory, config=config, max_in_flight=max_in_flight,
            loader=loader)) for role in ROLES}
        tasks: list[Callable[[], None]] = [self._listen]
        tasks += [partial(self._watch, role, child) for role, child in self.children.items()]
        self._threads = [threading.Thread(target=task, name="longspan-watch", daemon=True)
                         for task in tasks]
        for thread in self._threads:
            thread.start()

    def send(self, message: Begin | Command | Prepare) -> None:
        """Send a command to the scheduler, what is to be prepared to the runner."""
        (self._grammars if isinstance(message, Prepare) else self._scheduler).put(message)

    def stop(self) -> None:
        """Cut the lifelines."""
        self._is_stopping.set()
        for child in self.children.values():
            assert child.stdin is not None
            child.stdin.close()

    def join(self, timeout_s: float) -> None:
        """Wait until both are gone; they are killed when they take long."""
        end_s = time.monotonic() + min(timeout_s, STOP_S)
        for child in self.children.values():
            try:
                child.wait(max(0.0, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for thread in self._threads:
            thread.join()
        self._inbox.close()
        self._scheduler.close()
        self._grammars.close()
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _listen(self) -> None:
        while not self._is_stopping.is_set():
            message = self._inbox.get(POLL_S)
            if message is not None:
                self._post(message)

    def _watch(self, role: Role, child: subprocess.Popen[bytes]) -> None:
        status = child.wait()
        if status >= 0:
            self._is_stopping.wait(LAST_WORDS_S)
        if not self._is_stopping.is_set():
            self._post(Died(f"the {role} process {_ending(status)}"))


def _spawn(orders: Orders) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        python_command(__name__, f"longspan-{orders.role}"), stdin=subprocess.PIPE,
        start_new_session=True)
    assert child.stdin is not None
    # MessagePack, for JSON has no infinite budget; in hexadecimal, so that it is one line.
    child.stdin.write(msgspec.msgpack.encode(orders).hex().encode() + b"\n")
    child.stdin.flush()
    return child


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    why = "; the system does that when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{why}"


# -- in the child ----------------------------------------------------------------------------------


def main() -> None:
    """Run a child: read its orders, then take its role until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orders = msgspec.msgpack.decode(bytes.fromhex(first_line().decode()), type=Orders)
    threading.Thread(target=_hang_on, args=(orders.directory,), daemon=True).start()
    if orders.role == "scheduler":
        from longspan.engine.processes.scheduler_process import run
    else:
        from longspan.engine.processes.runner_process import run
    status = run(orders)
    os._exit(status)  # threads may be waiting or computing, and nothing is left to tidy up


def _hang_on(directory: str) -> None:
    """End this process when its parent lets go, whatever it is doing."""
    while os.read(0, 1):
        pass
    shutil.rmtree(Path(directory), ignore_errors=True)
    os._exit(0)
