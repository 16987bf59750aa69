"""Inboxes, outboxes and the scheduler's way to the runner."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from msgspec.structs import replace

from longspan.engine.processes import sockets as transport
from longspan.engine.processes.block_tables import BlockTableCache
from longspan.engine.processes.sockets import (
    Inbox,
    Outbox,
    RunnerTransport,
    StuckRunnerError,
)
from longspan.engine.processes.wire import Abort, Begin, Close, Step, ToScheduler
from longspan.engine.step import ScheduledBatch, ScheduledSlice, StepResult
from tests.engine.processes.test_wire import CONFIG

WAIT_S = 5.0


def make_batch(step_id: int, *items: tuple[str, int, list[int]], epoch: int = 0) -> ScheduledBatch:
    return ScheduledBatch(step_id=step_id, epoch=epoch, slices=tuple(
        ScheduledSlice(request_id=name, slot=slot, token_ids=array("i", [1]), cached_len=0,
                       prompt_len=4, block_ids=blocks, sparse=False, sampling=None)
        for name, slot, blocks in items))


def result(step_id: int, epoch: int = 0) -> StepResult:
    return StepResult(step_id=step_id, epoch=epoch, token_ids=())


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


class Ends:
    """A scheduler's transport and the other ends of its sockets."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
        self.inbox = Inbox(context, f"ipc://{path}/scheduler", ToScheduler)
        self.runner = Inbox(context, f"ipc://{path}/runner", Step)
        self.anybody = Outbox(context, f"ipc://{path}/scheduler")
        self.transport = RunnerTransport(
            self.inbox, Outbox(context, f"ipc://{path}/runner"), max_in_flight=2)


@pytest.fixture
def ends(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> Ends:
    return Ends(context, tmp_path)


def test_steps_go_out_and_results_come_in(ends: Ends) -> None:
    for step_id in (0, 1):
        ends.transport.submit(make_batch(step_id, ("a", 0, [3, 4])))
        assert ends.runner.get(WAIT_S).batch.step_id == step_id
        ends.anybody.put(result(step_id))
    found = [ends.transport.collect() for _ in range(2)]
    assert [step and step.step_id for step in found] == [0, 1]


def test_results_that_nobody_waits_for_are_dropped(
    ends: Ends, caplog: pytest.LogCaptureFixture,
) -> None:
    ends.transport.submit(make_batch(4, ("a", 0, [3]), epoch=1))
    for message in (result(4), result(3, 1), result(5, 1), Begin(CONFIG), result(4, 1),
                    result(4, 1), Close()):
        ends.anybody.put(message)
    found = ends.transport.collect()
    assert found is not None and (found.step_id, found.epoch) == (4, 1)
    assert isinstance(ends.transport.command(True), Close)
    assert [record.message for record in caplog.records] == [
        "a result was dropped: nobody waits for step 4 of epoch 0",
        "a result was dropped: nobody waits for step 3 of epoch 1",
        "a result was dropped: nobody waits for step 5 of epoch 1",
        "a second Begin was dropped",
        "a result was dropped: nobody waits for step 4 of epoch 1"]


def test_commands_interrupt_the_wait_for_a_result(ends: Ends) -> None:
    ends.transport.submit(make_batch(0, ("a", 0, [3])))
    ends.anybody.put(Abort("a"))
    assert ends.transport.collect() is None
    ends.anybody.put(result(0))
    assert ends.transport.command(False) == Abort("a")
    assert ends.transport.command(False) is None
    found = ends.transport.collect()
    assert found is not None and found.step_id == 0


def test_commands_wait_their_turn_behind_results(ends: Ends) -> None:
    ends.transport.submit(make_batch(0, ("a", 0, [3])))
    ends.anybody.put(result(0))
    ends.anybody.put(Abort("a"))
    assert ends.transport.command(True) == Abort("a")
    assert ends.transport.collect() is not None


def test_a_runner_that_takes_far_too_long_is_stuck(
    ends: Ends, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not while it loads, however long that takes; commands do not wind the watch up."""
    monkeypatch.setattr(transport, "WATCHDOG_S", 0.05)
    ends.transport.submit(replace(make_batch(0, ("a", 0, [3])), expected_s=1e-3))
    time.sleep(0.1)
    ends.anybody.put(result(0))
    assert ends.transport.collect() is not None
    ends.transport.submit(replace(make_batch(1, ("a", 0, [3])), expected_s=0.25))
    ends.anybody.put(Abort("b"))
    assert ends.transport.collect() is None and ends.transport.command(False) == Abort("b")
    monkeypatch.setattr(transport, "WATCHDOG_FACTOR", 0.0)
    ends.transport.submit(replace(make_batch(2, ("a", 0, [3])), expected_s=1e-3))
    ends.anybody.put(result(1))
    assert ends.transport.collect() is not None
    with pytest.raises(StuckRunnerError, match="should take 0.001 s has not ended"):
        ends.transport.collect()


def test_a_wait_may_be_limited(ends: Ends) -> None:
    ends.transport.submit(make_batch(0, ("a", 0, [3])))
    assert ends.transport.collect(0.01) is None
    ends.anybody.put(result(0))
    found = ends.transport.collect(WAIT_S)
    assert found is not None and found.step_id == 0


def test_tables_travel_once() -> None:
    sender, receiver = BlockTableCache(), BlockTableCache()
    script = [
        (make_batch(0, ("a", 0, [5, 6]), ("b", 1, [7])), {"a", "b"}),
        (make_batch(1, ("a", 0, [5, 6]), ("b", 1, [7])), set()),
        (make_batch(2, ("a", 0, [5, 6, 9]), ("b", 1, [7])), {"a"}),  # it has grown
        (make_batch(3, ("c", 1, [8])), {"c"}),  # another request in the slot
        (make_batch(4, ("b", 1, [7])), {"b"}),
        (make_batch(5, ("a", 0, [5, 6, 9])), set())]
    for batch, sent in script:
        step = sender.strip(batch)
        assert set(step.tables) == sent
        assert not any(item.block_ids for item in step.batch.slices)
        back = receiver.restore(step)
        assert [list(item.block_ids) for item in back.slices] == \
            [list(item.block_ids) for item in batch.slices]
        assert back.step_id == batch.step_id


def test_nothing_comes_within_the_time(ends: Ends) -> None:
    assert ends.inbox.get(0.01) is None and ends.transport.command(False) is None
