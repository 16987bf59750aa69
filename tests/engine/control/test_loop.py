"""The loop: order, several steps in flight, interrupts."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import pairwise

import pytest

from longspan.engine.control.latency import Costs
from longspan.engine.control.loop import PREFILL_AHEAD_S, Loop
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.control.transport import LocalTransport
from longspan.engine.step import ScheduledBatch, StepResult
from tests.doubles import DeepTransport, FakeRunner, complete, make_request

CONFIG = SchedulerConfig(
    num_blocks=32, block_size=4, max_model_len=64, prefill_chunk_len=8, max_num_requests=4)


class FailingRunner(FakeRunner):
    """Interrupted in the second step."""

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute, or be interrupted."""
        if batch.step_id == 1:
            raise KeyboardInterrupt
        return super().execute(batch)


def make_runner(kind: type[FakeRunner] = FakeRunner) -> FakeRunner:
    return kind(num_blocks=32, block_size=4, prefill_chunk_len=8)


def test_an_idle_loop_does_nothing() -> None:
    loop = Loop(Scheduler(CONFIG), LocalTransport(make_runner()))
    assert loop.is_idle and loop.turn().updates == ()


def test_reports_carry_times_and_pair_counts() -> None:
    loop = Loop(Scheduler(CONFIG), LocalTransport(make_runner()))
    loop.add(make_request("a", [1, 2], max_tokens=1))
    report = loop.turn()
    assert 0 < report.submitted_s <= report.finished_s
    assert (report.kept_pairs, report.causal_pairs) == (1.0, 4.0)
    assert loop.is_idle


def test_callbacks_come_before_a_step_is_computed_and_before_its_result_counts() -> None:
    log, runner, scheduler = list[tuple[str, int, int]](), make_runner(), Scheduler(CONFIG)

    def note(what: str) -> None:
        log.append((what, len(runner.batches), len(scheduler.in_flight)))

    loop = Loop(
        scheduler, LocalTransport(runner), on_submit=lambda batch: note(f"submit {batch.step_id}"),
        on_wait=lambda: note("wait"), on_result=lambda step, result: note(
            f"result {result.step_id} {step.batch.step_id} {step.submitted_s > 0}"))
    loop.add(make_request("a", [1, 2], max_tokens=2, ignore_eos=True))
    loop.turn()
    assert log == [("submit 0", 0, 1), ("wait", 1, 1), ("result 0 0 True", 1, 1)]
    loop.turn()
    assert log[3:] == [("submit 1", 1, 1), ("wait", 2, 1), ("result 1 1 True", 2, 1)]


class Device:
    """Computes in order; counts the steps that were launched and not waited for."""

    def __init__(self) -> None:
        self.runner, self.ahead, self.most_ahead = make_runner(), 0, 0
        self.results: list[StepResult] = []

    def launch(self, batch: ScheduledBatch) -> Device:
        """Compute, keep the result for `wait`."""
        self.ahead += 1
        self.most_ahead = max(self.most_ahead, self.ahead)
        self.results.append(self.runner.execute(batch))
        return self

    def wait_for(self, timeout_s: float) -> bool:
        """It is there."""
        return True

    def wait(self) -> StepResult:
        """The oldest result."""
        self.ahead -= 1
        return self.results.pop(0)


def test_steps_are_launched_ahead_in_one_process() -> None:
    device = Device()
    loop = Loop(Scheduler(CONFIG), LocalTransport(device, max_in_flight=2), launch_s=0.0)
    requests = [make_request(name, range(1, 21), max_tokens=5, ignore_eos=True) for name in "ab"]
    for request in requests:
        loop.add(request)
    while not loop.is_idle:
        loop.turn()
    assert device.most_ahead == 2 and device.ahead == 0
    for request in requests:
        assert list(request.output_ids) == complete(request.prompt_ids, request.params)


def test_what_was_launched_before_an_interrupt_is_forgotten() -> None:
    device = Device()
    loop = Loop(Scheduler(CONFIG), LocalTransport(device, max_in_flight=2))
    loop.add(make_request("a", range(1, 21), max_tokens=5))
    loop.turn()
    loop.interrupt()
    device.results.clear()
    request = make_request("b", range(1, 21), max_tokens=5, ignore_eos=True)
    loop.add(request)
    while not loop.is_idle:
        loop.turn()
    assert list(request.output_ids) == complete(request.prompt_ids, request.params)


def test_prefill_chunks_of_one_prompt_fill_the_pipeline() -> None:
    transport = DeepTransport(make_runner(), max_in_flight=3)
    loop = Loop(Scheduler(CONFIG), transport, launch_s=0.0)
    request = make_request("a", range(1, 41), max_tokens=4, ignore_eos=True)
    loop.add(request)
    loop.turn()
    assert len(transport.results) == 2 and request.scheduled_len == 24
    while not loop.is_idle:
        loop.turn()
    assert list(request.output_ids) == complete(request.prompt_ids, request.params)


@pytest.mark.parametrize(("step_s", "most", "in_flight"), [
    (1.0, 2, 2), (0.2, 2, 3), (0.1, 2, 4), (0.1, 3, 5), (0.01, 2, 7)])
def test_short_chunks_are_launched_before_the_device_waits_for_them(
    step_s: float, most: int, in_flight: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk takes the host 0.3 s to launch. Behind the last one of the prompt's six one token is
    decoded: its number is known when it was sampled."""
    transport = DeepTransport(make_runner(), max_in_flight=most)
    scheduler = Scheduler(replace(CONFIG, prior=Costs(dense=(step_s, 0.0, 0.0))))
    monkeypatch.setattr(scheduler.latency, "observe", lambda work, seconds: None)
    loop = Loop(scheduler, transport, launch_s=0.3)
    request = make_request("a", range(1, 49), max_tokens=4, ignore_eos=True)
    loop.add(request)
    loop.turn()
    assert len(transport.results) == in_flight - 1
    while not loop.is_idle:
        loop.turn()
    assert list(request.output_ids) == complete(request.prompt_ids, request.params)


def test_a_prefill_is_not_queued_behind_another_one() -> None:
    """A request that arrives during a long step waits for that one only; decodes do run ahead."""
    transport = DeepTransport(make_runner(), max_in_flight=2)
    loop = Loop(Scheduler(CONFIG), transport, queues_prefill=False)
    loop.add(make_request("a", range(1, 25), max_tokens=4, ignore_eos=True))
    for _ in range(3):
        loop.turn()
        assert not transport.results
    loop.turn()
    assert len(transport.results) == 1
    while not loop.is_idle:
        loop.turn()
    ahead = [[item.is_run_ahead for item in batch.slices]
             for batch in transport.executor.batches]
    assert ahead == [[False], [False], [False], [False], [True], [True]]


class TimedRunner(FakeRunner):
    """Says that every step takes this long."""

    step_s = 0.0

    def elapsed_s(self, batch: ScheduledBatch) -> float:
        """That."""
        return self.step_s


@pytest.mark.parametrize(("step_s", "max_in_flight", "depth"), [
    (1e-2, 2, 2), (3e-3, 2, 2), (2e-3, 2, 3), (1.1e-3, 2, 5), (1e-4, 2, 8), (1e-2, 3, 3),
    (1e-4, 1, 1)])
def test_short_decode_steps_are_queued_by_their_time(
    step_s: float, max_in_flight: int, depth: int,
) -> None:
    """Once their time is known. Behind a prefill there is one step if it is short, else nothing."""
    runner = make_runner(TimedRunner)
    assert isinstance(runner, TimedRunner)
    runner.step_s = step_s
    transport = DeepTransport(runner, max_in_flight)
    each = (step_s, 0.0, 0.0)
    loop = Loop(Scheduler(replace(CONFIG, prior=Costs(dense=each, decode=each))), transport,
                queues_prefill=False, ahead_s=5e-3)
    requests = [make_request(name, [1, 2, len(name)], max_tokens=40, ignore_eos=True)
                for name in ("a", "bb")]
    depths = list[int]()
    for request in requests:
        loop.add(request)
        for _ in range(12):
            loop.turn()
            depths.append(len(transport.results))
    while not loop.is_idle:
        loop.turn()
    assert max(depths) == depth - 1 and depths[5:12] == [depth - 1] * 7
    behind = 2 * step_s <= PREFILL_AHEAD_S and max_in_flight > 1  # it prefills and decodes
    assert depths[12 + depth - 1] == behind
    for request in requests:
        assert list(request.output_ids) == complete(request.prompt_ids, request.params)


class ClockedTransport(DeepTransport):
    """Steps take their time on a clock that only waiting moves."""

    def __init__(self, executor: TimedRunner, max_in_flight: int) -> None:
        super().__init__(executor, max_in_flight)
        self.now_s, self.step_s = 100.0, executor.step_s
        self.ends_s, self.log = deque[float](), list[tuple[str, float]]()

    def monotonic(self) -> float:
        """In place of ``time.monotonic``."""
        return self.now_s

    def submit(self, batch: ScheduledBatch) -> None:
        """Begin behind the steps before."""
        super().submit(batch)
        self.ends_s.append(max([self.now_s, *self.ends_s]) + self.step_s)
        self.log.append(("submit", self.now_s))

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Wait."""
        due_s = self.now_s + (1e9 if timeout_s is None else timeout_s)
        if due_s < self.ends_s[0]:
            self.now_s = due_s
            return None
        self.now_s = max(self.now_s, self.ends_s.popleft())
        self.log.append(("end", self.now_s))
        return super().collect()


@pytest.mark.parametrize(("predicted_s", "lead_s"), [
    (0.03, 0.01), (0.024, 0.008 + 0.006), (0.05, 0.0)])
def test_a_step_is_queued_shortly_before_the_prefill_ends(
    predicted_s: float, lead_s: float, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its predicted end: if it comes sooner, then when it is there. What the model learns from
    the steps is left out: it would soon predict them well."""
    runner = make_runner(TimedRunner)
    assert isinstance(runner, TimedRunner)
    runner.step_s = 0.03
    transport = ClockedTransport(runner, max_in_flight=2)
    monkeypatch.setattr("longspan.engine.control.loop.time", transport)
    each = (predicted_s, 0.0, 0.0)
    scheduler = Scheduler(replace(CONFIG, prior=Costs(dense=each, decode=each)))
    monkeypatch.setattr(scheduler.latency, "observe", lambda work, seconds: None)
    loop = Loop(scheduler, transport, queues_prefill=False)
    request = make_request("a", range(1, 49), max_tokens=2, ignore_eos=True)
    loop.add(request)
    while not loop.is_idle:
        loop.turn()
    assert list(request.output_ids) == complete(request.prompt_ids, request.params)
    ends = [time_s for what, time_s in transport.log if what == "end"]
    submits = [time_s for what, time_s in transport.log if what == "submit"]
    assert len(ends) > 3
    leads = [end_s - next_s for end_s, next_s in zip(ends, submits[1:], strict=False)]
    assert leads[:3] == pytest.approx([lead_s] * 3, abs=1e-5)
    assert ends[3] - ends[0] == pytest.approx(3 * runner.step_s)


class SlowToLaunch(ClockedTransport):
    """The host needs nearly as long to launch a step that prefills as the device to compute it."""

    decode_s, launch_s = 1e-3, 2.8e-2

    def submit(self, batch: ScheduledBatch) -> None:
        """Launch, while the device computes what is there."""
        prefills = any(item.cached_len < item.prompt_len for item in batch.slices)
        begun_s, self.step_s = self.now_s, 3e-2 if prefills else self.decode_s
        super().submit(batch)
        self.now_s = begun_s + (self.launch_s if prefills else 0.0)


@pytest.mark.parametrize("predicted_s", [0.03, 0.02, 0.04])
def test_tokens_do_not_wait_for_the_launch_of_the_next_step(
    predicted_s: float, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt's tail behind a million tokens has many short kernels: its steps take the host as
    long as the device, and what decodes beside it paused for two of them."""
    runner = make_runner(TimedRunner)
    assert isinstance(runner, TimedRunner)
    runner.step_s = 0.03
    transport = SlowToLaunch(runner, max_in_flight=2)
    monkeypatch.setattr("longspan.engine.control.loop.time", transport)
    each = (predicted_s, 0.0, 0.0)
    scheduler = Scheduler(replace(CONFIG, prior=Costs(dense=each, decode=(1e-3, 0.0, 0.0))))
    monkeypatch.setattr(scheduler.latency, "observe", lambda work, seconds: None)
    loop = Loop(scheduler, transport, queues_prefill=False)
    loop.add(make_request("decoding", [1, 2], max_tokens=30, ignore_eos=True))
    loop.turn()
    loop.add(make_request("long", range(1, 49), max_tokens=2, ignore_eos=True))
    while not loop.is_idle:
        loop.turn()
    ends = [time_s for what, time_s in transport.log if what == "end"]
    pauses = [end_s - begun_s for begun_s, end_s in pairwise(ends)]
    assert len(pauses) > 10 and max(pauses) < 1.1 * runner.step_s


class Interrupting(DeepTransport):
    """Has news before every other result, and forgets nothing when told to."""

    has_news = False

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Every other time the result."""
        self.has_news = not self.has_news
        return None if self.has_news else super().collect()

    def discard(self) -> None:
        """Results of an earlier epoch still come."""


def test_news_come_between_steps_and_stale_results_change_nothing() -> None:
    scheduler = Scheduler(CONFIG)
    loop = Loop(scheduler, Interrupting(make_runner(), max_in_flight=2))
    loop.add(make_request("a", range(1, 30), max_tokens=4))
    assert [len(loop.turn().updates) for _ in range(3)] == [0, 1, 0]
    assert [update.finish_reason for update in loop.interrupt()] == ["abort"]
    request = make_request("b", range(2, 30), max_tokens=3, ignore_eos=True)
    loop.add(request)
    while not loop.is_idle:
        loop.turn()
        scheduler.check()
    assert list(request.output_ids) == complete(request.prompt_ids, request.params)


def test_an_abort_before_the_first_turn_is_reported_once() -> None:
    runner = make_runner()
    loop = Loop(Scheduler(CONFIG), LocalTransport(runner))
    loop.add(make_request("a", [1, 2], max_tokens=4))
    loop.abort("a")
    loop.abort("a")
    reasons = [update.finish_reason for update in loop.turn().updates]
    assert reasons == ["abort"] and loop.is_idle and not runner.batches


def test_the_engine_survives_an_interrupt() -> None:
    scheduler = Scheduler(CONFIG)
    loop = Loop(scheduler, LocalTransport(make_runner(FailingRunner)))
    loop.add(make_request("a", range(1, 30), max_tokens=4))
    loop.turn()
    with pytest.raises(KeyboardInterrupt):
        loop.turn()
    assert [update.finish_reason for update in loop.interrupt()] == ["abort"]
    assert loop.is_idle and scheduler.pool.num_available == 32
    request = make_request("b", range(1, 30), max_tokens=3)
    loop.add(request)
    while not loop.is_idle:
        loop.turn()
    assert request.num_cached_tokens == 8
    assert list(request.output_ids) == complete(request.prompt_ids, request.params)
