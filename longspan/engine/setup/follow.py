"""A rank other than 0: hears what to load and what to compute, until the group ends.

Run by rank 0 as a child with its orders on standard input, which is also its lifeline.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from queue import SimpleQueue

import msgspec

from longspan import garbage
from longspan.config import EngineConfig
from longspan.engine.device.launched_step import LaunchedStep
from longspan.engine.device.runner import Runner
from longspan.engine.device.stage_runner import StagedStep, StageRunner
from longspan.engine.processes.block_tables import BlockTableCache
from longspan.engine.processes.spawning import first_line
from longspan.engine.ranks.channel import Channel, ClosedError
from longspan.engine.ranks.hub import MEET_S, FollowerOrders
from longspan.engine.ranks.messages import (
    Bye,
    CompileAhead,
    Compute,
    Computed,
    Failed,
    Finish,
    Hello,
    Joined,
    RecordGraphs,
    Refused,
    ToFollower,
    Trace,
    Traced,
    Welcome,
)
from longspan.engine.setup.engine_plan import ResolvedEngine, decode_engine
from longspan.engine.setup.group import facts_of, join_group, orders_of
from longspan.errors import LongspanError
from longspan.rank_place import RankPlace

KEPT_STEPS = 16
"""Steps that may be under way on a device."""
POLL_S = 0.2
LOST_S = 1.0
"""A collective may fail before it is known which rank it fails by."""


def main() -> None:
    """Run a rank that rank 0 has spawned."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orders = msgspec.msgpack.decode(bytes.fromhex(first_line().decode()), type=FollowerOrders)
    threading.Thread(target=_hang_on, daemon=True).start()
    os._exit(follow(orders))  # threads may be waiting, and nothing is left to tidy up


def follow_torchrun(asked: EngineConfig, place: RankPlace) -> int:
    """Compute as one of the ranks that torchrun has started. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they go to all; rank 0 decides when the others end
    return follow(orders_of(asked, place))


def _hang_on() -> None:
    """End this process when rank 0 lets go, whatever it is doing."""
    while os.read(0, 1):
        pass
    os._exit(1)


def follow(orders: FollowerOrders) -> int:
    """Compute with a group until it ends. Returns the exit status; errors are one line on
    standard error."""
    try:
        Follower(orders).run()
        return 0
    except LongspanError as error:
        _tell(orders.rank, str(error))
        return 2
    except ClosedError as error:
        _tell(orders.rank, f"rank 0{error}")
    except _GroupFailed as error:
        _tell(orders.rank, str(error))
    except BaseException as error:
        _tell(orders.rank, _in_one_line(error))
    return 1


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


class _GroupFailed(Exception):
    """Another rank has failed."""


class Follower:
    """One rank that computes what rank 0 says."""

    def __init__(self, orders: FollowerOrders) -> None:
        self._orders = orders
        self._channel = Channel(
            _connect(orders), ToFollower, self._lost, orders.stall_s)

    def run(self) -> None:
        """Join, load, compute. Raises what ends it."""
        config, rank = self._orders.config, self._orders.rank
        try:
            self._channel.put(Hello(self._orders.token, rank, facts_of(config)))
            welcome = self._next(MEET_S)
            if isinstance(welcome, Bye):
                return  # rank 0 has no plan that fits, and says why
            assert isinstance(welcome, Welcome), welcome
            self._compute(self._load(config, welcome))
        except (ClosedError, _GroupFailed):
            raise
        except LongspanError as error:
            self._fail(str(error))
            raise
        except BaseException as error:
            time.sleep(LOST_S)  # rank 0 may know better why, and then ends this process
            self._fail(_in_one_line(error))
            raise

    def _load(self, config: EngineConfig, welcome: Welcome) -> Runner | StageRunner:
        engine: ResolvedEngine = decode_engine(welcome.engine, config)
        runner = engine.load_alone(join_group(self._orders.rank, config, welcome.store))
        self._channel.put(Joined())
        return runner

    def _compute(self, runner: Runner | StageRunner) -> None:
        tables, under_way = BlockTableCache(), deque[LaunchedStep | StagedStep]()
        launched: SimpleQueue[StagedStep] = SimpleQueue()
        unfinished = deque[StagedStep]()
        threading.Thread(target=self._tell, args=(launched,), daemon=True).start()
        while True:
            message = self._next()
            if isinstance(message, Bye):
                return
            if isinstance(message, Compute):
                step = runner.launch(tables.restore(message.step))
                if isinstance(step, StagedStep) and step.runner.is_first:
                    unfinished.append(step)
                elif isinstance(step, StagedStep):
                    launched.put(step)
                else:
                    under_way.append(step)
                if len(under_way) > KEPT_STEPS:
                    under_way.popleft().wait()
            elif isinstance(message, Finish):
                while unfinished and unfinished[0].batch.step_id <= message.step_id:
                    step = unfinished.popleft()
                    step.runner.finish_until(step)
                    launched.put(step)
            elif isinstance(message, RecordGraphs):
                runner.record_graphs()
            elif isinstance(message, Trace) and message.is_on:
                runner.trace()
            elif isinstance(message, Trace):
                self._channel.put(Traced(runner.traced()))
            elif isinstance(message, CompileAhead):
                runner.compile_ahead(message.steps)
                garbage.freeze()

    def _tell(self, launched: SimpleQueue[StagedStep]) -> None:
        """Tell rank 0 of each step of a pipeline that is computed here."""
        try:
            while True:
                self._channel.put(Computed(launched.get().wait()))
        except BaseException as error:
            self._fail(_in_one_line(error))
            os._exit(1)

    def _next(self, timeout_s: float | None = None) -> ToFollower:
        message: ToFollower = self._channel.get(timeout_s)
        if isinstance(message, Failed):
            raise _GroupFailed(message.reason)
        if isinstance(message, Refused):
            raise LongspanError(message.reason)
        return message

    def _fail(self, reason: str) -> None:
        self._channel.put(Failed(" ".join(reason.split())))
        time.sleep(POLL_S)

    def _lost(self, why: str) -> None:
        """End at once: this rank may be waiting in a collective."""
        _tell(self._orders.rank, why[2:] if why.startswith(": ") else f"rank 0{why}")
        os._exit(1)


def _connect(orders: FollowerOrders) -> socket.socket:
    end_s = time.monotonic() + MEET_S
    while True:
        try:
            return socket.create_connection((orders.address, orders.port), timeout=10)
        except OSError as error:
            if time.monotonic() > end_s:
                raise LongspanError(
                    f"rank {orders.rank} cannot reach rank 0 at {orders.address} port "
                    f"{orders.port}: {error.strerror or error}; start rank 0, and see that its "
                    "machine lets connections in") from None
            time.sleep(POLL_S)


def _tell(rank: int, text: str) -> None:
    print(f"error: rank {rank}: {' '.join(text.split())}", file=sys.stderr, flush=True)
