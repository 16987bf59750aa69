"""Rank 0's side of a group: where the others call, who they are, and what becomes of them. No
torch."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from longspan.config import EngineConfig
from longspan.engine.processes.spawning import private_directory, python_command
from longspan.engine.processes.wire import Message
from longspan.engine.ranks.channel import GONE, STALL_S, Channel, ClosedError
from longspan.engine.ranks.messages import (
    Bye,
    Computed,
    Facts,
    Failed,
    Hello,
    Joined,
    Refused,
    ToLead,
    Trace,
    Traced,
    Welcome,
    differences,
    least_memory,
)
from longspan.engine.step import StepResult
from longspan.errors import LongspanError, RankLostError

FOLLOWER = "longspan.engine.setup.follow"
MEET_S = 300.0
"""Longest time until all ranks have called: they import torch, and may download the checkpoint."""
STOP_S = 3.0
GRACE_S = 1.0
"""Time for ranks to say why they end."""
POLL_S = 0.1


class FollowerOrders(msgspec.Struct, frozen=True, kw_only=True):
    """A spawned rank's task, the first line of its standard input."""

    address: str
    port: int
    token: str
    rank: int
    config: EngineConfig
    stall_s: float


class Hub:
    """Rank 0's connections to all other ranks of its group.

    Args:
        size: ranks, this one included.
        address: where to listen; port 0: any free one.
        meet_s: longest time until all are there.

    Raises `LongspanError` when nothing can be listened on there.
    """

    def __init__(
        self, size: int, *, address: str = "127.0.0.1", port: int = 0, token: str = "",
        stall_s: float | None = None, meet_s: float = MEET_S,
    ) -> None:
        self.size, self.address = size, address
        self.token = token or secrets.token_hex(16)
        self._stall_s, self._meet_s = stall_s or STALL_S, meet_s
        try:
            self._listener = socket.create_server((address, port))
        except OSError as error:
            raise LongspanError(
                f"rank 0 cannot listen on {address} port {port}: {error.strerror}; choose another "
                "port for the ranks to meet at") from None
        self.port = int(self._listener.getsockname()[1])
        self._listener.settimeout(POLL_S)
        self._channels: dict[int, Channel] = {}
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._directory = ""
        self._failure = ""
        self._has_failed, self._is_closed = threading.Event(), False
        self.on_failure: Callable[[], None] = lambda: None
        """Called once on a thread when a rank is lost: what waits for it must be woken."""
        self.store = ""
        """Where torch.distributed is to meet, see `Welcome`."""
        self.kept: object = None
        """What must live as long as the group."""
        self.total_bytes = self.free_bytes = 0
        """Memory that every rank has."""

    def spawn(self, configs: Sequence[EngineConfig]) -> None:
        """Start the other ranks on this machine: rank 1 and on, with these configurations."""
        for rank, config in enumerate(configs, 1):
            orders = FollowerOrders(
                address=self.address, port=self.port, token=self.token, rank=rank, config=config,
                stall_s=self._stall_s)
            child = subprocess.Popen(
                python_command(FOLLOWER, f"longspan-rank-{rank}"), stdin=subprocess.PIPE,
                start_new_session=True)
            assert child.stdin is not None
            child.stdin.write(msgspec.msgpack.encode(orders).hex().encode() + b"\n")
            child.stdin.flush()
            self._children[rank] = child

    def meet(self, facts: Facts) -> None:
        """Wait until all ranks have called, and compare them with this one.

        Raises `LongspanError` where they do not fit together, `RankLostError` where one does not
        come. All ranks are told.
        """
        every, end_s = {0: facts}, time.monotonic() + self._meet_s
        while len(every) < self.size:
            self.check()
            if time.monotonic() > end_s:
                absent = [str(rank) for rank in range(self.size) if rank not in every]
                self._refuse(LongspanError(
                    f"rank {', '.join(absent)} of {self.size} did not come within "
                    f"{self._meet_s:g} s; start all of them"))
            hello = self._accept()
            if hello is not None and hello.rank in every:
                self._refuse(LongspanError(f"two ranks say that they are rank {hello.rank} of "
                                           f"{self.size}; start each once"))
            if hello is not None:
                every[hello.rank] = hello.facts
        self._channels = dict(sorted(self._channels.items()))  # by rank, not as they called
        ordered = [every[rank] for rank in range(self.size)]
        reason = differences(ordered)
        if reason:
            self._refuse(LongspanError(reason))
        self.total_bytes, self.free_bytes = least_memory(ordered)

    @property
    def directory(self) -> str:
        """A private directory of this machine, removed at the end."""
        self._directory = self._directory or private_directory()
        return self._directory

    def welcome(self, engine: bytes) -> None:
        """Tell all ranks what to load."""
        self.send(Welcome(engine, self.store))

    def wait_joined(self) -> None:
        """Wait until all ranks have loaded. Raises `RankLostError` when one has not."""
        for channel in self._channels.values():
            while True:
                self.check()
                with contextlib.suppress(TimeoutError, ClosedError):
                    if isinstance(channel.get(POLL_S), Joined):
                        break

    def results(self, step_id: int) -> list[StepResult]:
        """Wait for what the other ranks of a pipeline know of a step; steps before it are dropped.
        Raises `RankLostError`."""
        found = list[StepResult]()
        for channel in self._channels.values():
            while True:
                self.check()
                with contextlib.suppress(TimeoutError, ClosedError):
                    message = channel.get(POLL_S)
                    assert isinstance(message, Computed), message
                    if message.result.step_id == step_id:
                        found.append(message.result)
                        break
        return found

    def traced(self) -> list[tuple[tuple[float, float], ...]]:
        """Ask the other ranks when they computed what, and wait for it. Raises `RankLostError`."""
        self.send(Trace(False))
        found = []
        for channel in self._channels.values():
            while True:
                self.check()
                with contextlib.suppress(TimeoutError, ClosedError):
                    message = channel.get(POLL_S)
                    if isinstance(message, Traced):
                        found.append(message.spans)
                        break
        return found

    def send(self, message: Message) -> None:
        """Send to all other ranks."""
        for channel in self._channels.values():
            channel.put(message)

    def check(self) -> None:
        """Raise `RankLostError` when a rank is lost."""
        for rank, child in self._children.items():
            status = child.poll()
            if status is not None and not self._is_closed:
                self._fail(f"rank {rank} {_ending(status)}")
        if self._has_failed.is_set():
            raise RankLostError(self._failure)

    def close(self, reason: str = "") -> None:
        """End all ranks: in order, or for a reason that they are told. Does nothing twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self.send(Failed(reason) if reason else Bye())
        self._listener.close()
        end_s = time.monotonic() + STOP_S
        for child in self._children.values():
            assert child.stdin is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end_s - time.monotonic()))
            child.kill()
            child.wait()
            with contextlib.suppress(OSError):
                child.stdin.close()
        for channel in self._channels.values():
            channel.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _accept(self) -> Hello | None:
        """Take one call, of a rank of this group."""
        try:
            sock, _ = self._listener.accept()
        except TimeoutError:
            return None
        rank = [0]
        channel = Channel(sock, ToLead, lambda why: self._lost(rank[0], why), self._stall_s)
        try:
            hello = channel.get(self._stall_s)
        except (TimeoutError, ClosedError):
            hello = None
        if isinstance(hello, Failed):
            self._fail(f"a rank could not start: {hello.reason}")
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token, self.token) or not (
                0 < hello.rank < self.size):
            channel.put(Refused("this is no rank of the group"))
            channel.close()
            return None
        rank[0] = hello.rank
        self._channels.setdefault(hello.rank, channel)
        return hello

    def _refuse(self, error: LongspanError) -> None:
        self.send(Refused(str(error)))
        self.close(str(error))
        raise error

    def _lost(self, rank: int, why: str) -> None:
        if not self._is_closed and rank:
            child = self._children.get(rank)
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = None if child is None or why != GONE else child.wait(GRACE_S)
                if status is not None:
                    why = f" {_ending(status)}"
            self._fail(f"rank {rank}{why}")

    def _fail(self, reason: str) -> None:
        if self._has_failed.is_set() or self._is_closed:
            return
        self._failure = reason
        self._has_failed.set()
        self.send(Failed(reason))
        end_s = time.monotonic() + GRACE_S
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end_s - time.monotonic()))
            child.kill()  # one that is stopped; a collective that waits for it ends with an error
        self.on_failure()


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"
