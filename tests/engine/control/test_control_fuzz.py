"""Seeded fuzz of the whole control plane: serving loop, loop, scheduler, the way to the runner
and back.

Everything is real but the sockets, the clock and the runner, which checks every key that it reads.
Messages pass through their encoding. Commands come at any moment; the runner computes when it
likes, results come late, waits end without one; interrupts drop what is in flight, whose results
still come. A front end concludes from the runner's results alone when its requests are finished.

At every wait blocks, slots and promises are recounted and the load that was told is the load that
there is; no allocation may evict cached content while free blocks suffice; and each answer is the
one that the request gets alone.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import pytest
from msgspec.structs import replace

from longspan.engine.control import loop
from longspan.engine.control.blocks import SHORT_TAIL, BlockPool
from longspan.engine.control.copy_queue import TierConfig
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.front.tracking import Tracker, updates
from longspan.engine.processes import sockets as transport
from longspan.engine.processes.block_tables import BlockTableCache
from longspan.engine.processes.serving_loop import ServingLoop
from longspan.engine.processes.sockets import Inbox, Outbox, RunnerTransport
from longspan.engine.processes.wire import (
    Abort,
    Add,
    Close,
    Codec,
    Command,
    FromEngine,
    LoadChanged,
    Message,
    Step,
    Stepped,
    Submitted,
    ToScheduler,
    computed_slices,
    encode,
)
from longspan.engine.request import Request
from longspan.engine.step import StepResult, Update
from tests.doubles import FakeRunner, complete, make_request, random_tiers

SEEDS = 12
EVENTS = 120
MAX_WAITS = 50 * EVENTS
PATIENCE_S = 100.0
"""Longer waits are those of the watchdog: a result or a command comes first."""


class Interrupted(Exception):
    """As by a key."""


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1.0

    def monotonic(self) -> float:
        """Simulated."""
        return self.now_s


class WatchedPool(BlockPool):
    """Checks what each allocation costs."""

    num_kept = num_given_up = num_evictions_seen = 0

    def allocate(self, count: int, behind: Sequence[int] = ()) -> list[int] | None:
        """As the pool does."""
        parents = {value: self._parent_of[block] for value, block in self._block_of.items()}
        num_free, prefix = self._free.count(1), self._hash_of[behind[-1]] if behind else None
        blocks = super().allocate(count, behind)
        lost = parents.keys() - self._block_of.keys()
        if blocks is not None and count <= num_free:
            assert all(self._descends(value, prefix, parents) for value in lost)
            assert len(lost) <= len(behind) // SHORT_TAIL
            self.num_kept += len(parents) > 0
            self.num_given_up += len(lost)
        self.num_evictions_seen += len(lost)
        return blocks

    @staticmethod
    def _descends(
        value: bytes, prefix: bytes | None, parents: dict[bytes, bytes | None],
    ) -> bool:
        parent = parents.get(value)
        while parent and parent != prefix:
            parent = parents.get(parent)
        return prefix is not None and parent == prefix


class World:
    """What surrounds a scheduler's process: its inbox and outboxes, a runner, a front end."""

    def __init__(self, seed: int, clock: Clock, *, has_places: bool = True) -> None:
        self.rng = rng = random.Random(seed)
        self.clock = clock
        block_size = rng.choice([1, 1, 4])
        self.config = config = SchedulerConfig(
            num_blocks=rng.choice([96, 160, 400]) // block_size, block_size=block_size,
            max_model_len=96, prefill_chunk_len=rng.choice([4, 8, 32]),
            max_num_requests=rng.choice([1, 3, 8]), tail_len=rng.choice([0, 5]),
            num_layers=rng.choice([1, 3]), piece_rows=rng.choice([4, 1000]),
            unit_len=rng.choice([1, 4]), step_budget_s=rng.choice([None, 0.004, 0.02]),
            burst_s=rng.choice([0.0, 0.01, 1.0]),
            tiers=random_tiers(random.Random(1000 + seed)) if has_places else TierConfig())
        self.scheduler = Scheduler(config)
        self.pool = self.scheduler.pool = WatchedPool(config.num_blocks)
        self.pool.notes_evicted = config.tiers.keeps_host and config.tiers.num_slots > 0
        tiers = self.scheduler.tiers
        self.scheduler._prefixes._pool = tiers._pool = tiers._writer._pool = self.pool
        way = RunnerTransport(cast(Inbox, self), cast(Outbox, self), rng.choice([1, 2, 3]))
        self.serving = ServingLoop(self.scheduler, way, way.command, self.hear)
        self.runner = FakeRunner(
            num_blocks=config.num_blocks, block_size=block_size,
            prefill_chunk_len=config.prefill_chunk_len, tail_len=config.tail_len)
        self.runner.places.rng = random.Random(2000 + seed)
        self.tables, self.steps, self.results = BlockTableCache(), deque[bytes](), deque[bytes]()
        self.front = Front()
        self.stems = [[rng.randrange(50) for _ in range(60)] for _ in range(3)]
        self.num_waits, self.num_events, self.num_interrupts, self.num_late = 0, 0, 0, 0

    def run(self) -> None:
        """Until everything that arrived is finished."""
        while True:
            try:
                self.serving.run()
                return
            except Interrupted:
                self.num_interrupts += 1
                for update in self.serving._loop.interrupt():
                    self.front.take(update)

    # -- the scheduler's inbox and the runner's outbox -----------------------------------------

    def get(self, timeout_s: float | None = None) -> StepResult | Command | None:
        """The next message to the scheduler, or none within the time."""
        self.check(is_waiting=timeout_s != 0.0)
        self.num_waits += 1
        assert self.num_waits < MAX_WAITS, "it turns and turns"
        must_answer = timeout_s is None or timeout_s > PATIENCE_S
        while True:
            kind = self.rng.choices(
                ["command", "compute", "result", "nothing", "interrupt"], [8, 40, 40, 12, 1])[0]
            if kind == "command" and self.num_events < EVENTS:
                self.num_events += 1
                return self.decoded(self.command())
            if kind == "compute" and self.steps:
                self.compute()
            elif kind == "result" and self.results:
                return cast(StepResult, self.decoded(self.results.popleft()))
            elif kind == "nothing" and not must_answer:
                self.num_late += bool(self.steps)
                self.clock.now_s += timeout_s or 0.0
                return None
            elif kind == "interrupt" and self.steps:
                raise Interrupted
            elif self.num_events >= EVENTS and not (self.steps or self.results):
                assert self.serving._loop.is_idle or not must_answer, "nothing will come"
                return Close() if self.serving._loop.is_idle else None

    def put(self, step: Step) -> None:
        """A step for the runner."""
        self.steps.append(encode(step))

    def decoded(self, message: bytes | Message) -> StepResult | Command:
        """As it arrives."""
        frame = message if isinstance(message, bytes) else encode(message)
        found = cast(StepResult | Command, Codec(ToScheduler).decode(frame))
        if isinstance(found, Add):
            self.front.theirs[found.request.request_id] = found.request
        return found

    # -- what happens --------------------------------------------------------------------------

    def command(self) -> Add | Abort:
        """A command that the front end sends."""
        rng, front = self.rng, self.front
        if front.open and rng.random() < 0.2:
            return Abort(front.forget(rng.choice([*front.open])))
        if rng.random() < 0.05:
            return Abort("never seen")
        stem, fork = rng.choice(self.stems), rng.choice([rng.randrange(1, 60), 40, 58, 59])
        prompt = [*stem[:fork], rng.randrange(50), *stem[fork + 1 : fork + rng.randrange(1, 30)]]
        return Add(front.ask(make_request(
            f"{self.num_events}", prompt, sparse=rng.random() < 0.3,
            max_tokens=rng.randrange(1, 12), json_schema="{}" if rng.random() < 0.1 else None)))

    def compute(self) -> None:
        """The runner takes its next step, and tells the front end."""
        batch = self.tables.restore(Codec(Step).decode(self.steps.popleft()))
        started_s = self.clock.now_s
        result = self.runner.execute(batch)
        if result.token_ids and self.rng.random() < 0.02:
            place = self.rng.randrange(len(result.token_ids))
            result = replace(result, failures={place: "no way on"}, token_ids=tuple(
                -1 if index == place else token for index, token in enumerate(result.token_ids)))
        self.clock.now_s += result.elapsed_s
        self.results.append(encode(result))
        self.front.deliver(Stepped(slices=computed_slices(batch), result=result,
                                   started_s=started_s, finished_s=self.clock.now_s))

    def hear(self, message: FromEngine) -> None:
        """What the serving loop tells the front end."""
        assert isinstance(message, LoadChanged | Submitted)
        if isinstance(message, LoadChanged):
            self.front.load = message.load
            return
        for name, cached_len in message.prefills:
            first_len = self.front.begun.setdefault(name, cached_len)
            assert first_len == self.front.theirs[name].num_cached_tokens

    def check(self, *, is_waiting: bool) -> None:
        """Recount; and blocks that steps in flight write still belong to their requests."""
        self.scheduler.check()
        if is_waiting:
            assert self.front.load == self.scheduler.load, "an old load was told"
        for step in self.scheduler.in_flight:
            for item in step.batch.slices:
                owner = self.scheduler._running[item.request_id]
                assert list(owner.block_ids) == list(item.block_ids) and owner.slot == item.slot


class Front:
    """Those who wait for answers."""

    def __init__(self) -> None:
        self.open = dict[str, tuple[Request, list[int]]]()
        self.trackers = dict[str, Tracker]()
        self.theirs = dict[str, Request]()
        """The scheduler's own copies."""
        self.begun = dict[str, int]()
        """Cached tokens of requests whose first step was told."""
        self.load: Any = None
        self.num_failures = 0
        self.reasons = dict[str, str]()
        self.outputs = dict[str, list[int]]()
        self.epoch = 0

    def ask(self, request: Request) -> Request:
        """Wait for an answer to it."""
        self.open[request.request_id] = request, []
        self.trackers[request.request_id] = Tracker(request)
        return request

    def deliver(self, message: Stepped) -> None:
        """As `AsyncEngine` does."""
        result = message.result
        if result.epoch < self.epoch:
            return
        self.epoch = result.epoch
        for update in updates(message, self.trackers):
            assert update.num_cached_tokens == self.begun[update.request_id], "not told"
            self.take(update)

    def take(self, update: Update) -> None:
        """The next token of a request, or its end."""
        if update.request_id not in self.open:
            return
        request, outputs = self.open[update.request_id]
        outputs += [] if update.token_id is None else [update.token_id]
        if update.finish_reason is None:
            return
        self.forget(request.request_id)
        self.num_failures += update.failure == "no way on"
        self.reasons[request.request_id] = update.finish_reason
        wanted = complete(request.prompt_ids, request.params)
        if update.finish_reason != "abort":
            assert outputs == wanted
            assert update.num_cached_tokens == self.theirs[request.request_id].num_cached_tokens
        assert outputs == wanted[:len(outputs)]
        self.outputs[request.request_id] = outputs

    def forget(self, request_id: str) -> str:
        """Wait no longer."""
        del self.open[request_id], self.trackers[request_id]
        return request_id

    def check(self) -> None:
        """Both sides have come to the same conclusions."""
        assert not self.open, "somebody still waits"
        for name, reason in self.reasons.items():
            request = self.theirs[name]
            assert request.is_finished
            if request.finish_reason != "abort":
                assert (request.finish_reason, list(request.output_ids)) == (
                    reason, self.outputs[name])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(transport, "time", clock)
    return clock


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_control_plane_gives_the_answers_of_each_request_alone(
    seed: int, clock: Clock,
) -> None:
    print(f"seed {seed}")
    world = World(seed, clock)
    world.run()
    world.front.check()
    world.scheduler.check()
    assert world.scheduler.is_idle and world.pool.num_available == world.config.num_blocks
    assert sum(reason != "abort" for reason in world.front.reasons.values()) > 10


def test_the_fuzz_meets_what_it_is_for(clock: Clock) -> None:
    worlds = [World(seed, clock, has_places=False) for seed in range(9)]
    for world in worlds:
        world.run()
    batches = [batch for world in worlds for batch in world.runner.batches]

    def count(attribute: str) -> int:
        return sum(getattr(world, attribute) for world in worlds)

    def pool_count(attribute: str) -> int:
        return sum(getattr(world.pool, attribute) for world in worlds)

    assert sum(world.front.num_failures for world in worlds) > 10
    assert count("num_interrupts") > 10 and count("num_late") > 100
    assert pool_count("num_kept") > 50 and pool_count("num_given_up") > 0
    assert pool_count("num_evictions_seen") > 100
    assert sum(item.is_run_ahead for batch in batches for item in batch.slices) > 100
    assert any(item.pieces and not item.pieces.is_last for b in batches for item in b.slices)
