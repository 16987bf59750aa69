"""Inboxes and outboxes of processes (ZeroMQ on unix sockets), and the scheduler's way to the
runner. No torch.

The sockets lie in a directory that only their owner may enter. A frame that is no message is
logged and dropped, and does no harm.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from typing import Any

import zmq

from longspan.engine.processes.block_tables import BlockTableCache
from longspan.engine.processes.spawning import SOCKET_REMEDY
from longspan.engine.processes.wire import (
    MAX_FRAME_BYTES,
    BadFrameError,
    Begin,
    Codec,
    Command,
    Message,
    ToScheduler,
    encode,
)
from longspan.engine.step import ScheduledBatch, StepResult
from longspan.errors import LongspanError

WATCHDOG_S, WATCHDOG_FACTOR = 120.0, 20.0
"""A runner counts as stuck when the steps in flight take longer than this time plus this many times
their predicted time. Kernels that are compiled on their first use take a while."""
LINGER_MS = 2000
"""Longest time that last words may take to leave a process, milliseconds."""
logger = logging.getLogger("longspan.engine")


class Inbox:
    """Receives the messages to this process, from any other.

    Args:
        address: the socket's; it is bound here.
        kind: the messages taken, a union of those in `longspan.engine.processes.wire`.

    Raises `LongspanError` when the address cannot be bound.
    """

    def __init__(self, context: zmq.Context[Any], address: str, kind: Any) -> None:
        self._codec = Codec(kind)
        self._socket = context.socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.set(zmq.LINGER, 0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise LongspanError(
                f"cannot make the engine's socket {address.removeprefix('ipc://')}: "
                f"{os.strerror(error.errno or 0)}; {SOCKET_REMEDY}") from None

    def get(self, timeout_s: float | None = None) -> Any:
        """Wait for the next message; None when none comes in time. No ``timeout_s``: no limit."""
        timeout_ms = None if timeout_s is None else round(1e3 * timeout_s)
        while self._socket.poll(timeout_ms):
            try:
                return self._codec.decode(self._socket.recv())
            except BadFrameError as error:
                logger.warning("a frame was dropped: %s", error)
        return None

    def close(self) -> None:
        """Close the socket and drop what is unread."""
        self._socket.close()


class Outbox:
    """Sends to the inbox of one process. Never waits: messages queue up here until they leave."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.LINGER, LINGER_MS)
        self._socket.connect(address)

    def put(self, message: Message | StepResult) -> None:
        """Send. Only one thread may do so."""
        self._socket.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """Close the socket; what is unsent still goes out."""
        self._socket.close()


class StuckRunnerError(RuntimeError):
    """A step takes many times as long as it should: the device hangs, or its driver does."""


class RunnerTransport:
    """Carries steps to the runner process and results back. It also takes the scheduler's commands,
    which come to the same inbox, so that one wait serves both.

    Args:
        inbox: the scheduler's.
        max_in_flight: 2 or more runs ahead; 1 is the synchronous baseline of benchmarks.
    """

    def __init__(self, inbox: Inbox, runner: Outbox, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self._inbox, self._runner = inbox, runner
        self._tables = BlockTableCache()
        self._commands: deque[Command] = deque()
        self._results: deque[StepResult] = deque()
        self._expected: deque[ScheduledBatch] = deque()  # the steps in flight
        self._deadline_s = math.inf
        """When the runner counts as stuck. Loading and the first step have no limit."""
        self._is_warm = False

    def submit(self, batch: ScheduledBatch) -> None:
        """Send a step."""
        self._expected.append(batch)
        if len(self._expected) == 1:
            self._set_deadline()
        self._runner.put(self._tables.strip(batch))

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Wait for the oldest result; None when a command comes first, or the time is over.

        Raises `StuckRunnerError` when it takes far longer than predicted.
        """
        end_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._results:
            wait_s = min(end_s, self._deadline_s) - time.monotonic()
            message = self._inbox.get(None if math.isinf(wait_s) else max(0.0, wait_s))
            if message is None:
                if end_s < self._deadline_s:
                    return None
                raise StuckRunnerError(
                    f"the runner is stuck: a step that should take "
                    f"{self._expected[0].expected_s:.2g} s has not ended")
            self._sort(message)
            if self._commands:
                return None
        return self._results.popleft()

    def discard(self) -> None:
        """Do nothing: results of an earlier epoch are dropped when they come."""

    def command(self, must_wait: bool) -> Command | None:
        """Take the next command; None when there is none and ``must_wait`` is false."""
        while not self._commands:
            message = self._inbox.get(None if must_wait else 0.0)
            if message is None:
                return None
            self._sort(message)
        return self._commands.popleft()

    def _set_deadline(self) -> None:
        """Set the deadline by the steps in flight."""
        if self._is_warm:
            expected_s = sum(batch.expected_s for batch in self._expected)
            self._deadline_s = time.monotonic() + WATCHDOG_S + WATCHDOG_FACTOR * expected_s

    def _sort(self, message: ToScheduler) -> None:
        if isinstance(message, StepResult):
            if self._expected and (self._expected[0].epoch, self._expected[0].step_id) == (
                    message.epoch, message.step_id):
                self._expected.popleft()
                self._results.append(message)
                self._is_warm = True
                self._set_deadline()
            else:
                logger.warning("a result was dropped: nobody waits for step %d of epoch %d",
                               message.step_id, message.epoch)
        elif isinstance(message, Begin):
            logger.warning("a second Begin was dropped")
        else:
            self._commands.append(message)
