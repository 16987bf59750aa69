"""Seeded schedule fuzz: 10,800 random events on a fake model that checks every key it reads.

Arrivals, aborts in every state, requests that never fit, tiny KV pools (so that cached blocks are
evicted all the time), blocks that go to host memory and disk and come back while files get lost,
time budgets, sparse chunks in pieces, shared prefixes, one to eight steps in flight, and interrupts
after which steps of the earlier epoch are still computed and their results come late. After every
event blocks, slots and promises are recounted; every answer is compared with the one that the
request gets alone.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable

import pytest

from longspan.engine.control.loop import MAX_SHORT_STEPS
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.request import Request
from longspan.engine.step import ScheduledBatch, Update
from longspan.errors import PromptTooLongError
from tests.doubles import FakeRunner, complete, make_request, random_tiers

SEEDS = 27
EVENTS = 400
KINDS = {"arrive": 18, "step": 72, "abort": 5, "oversize": 3, "interrupt": 2}


class World:
    """A scheduler, a runner behind a queue, and those who wait for answers."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        block_size = rng.choice([1, 4])
        self.config = config = SchedulerConfig(
            num_blocks=rng.choice([24, 64, 160]) // block_size, block_size=block_size,
            max_model_len=96, prefill_chunk_len=rng.choice([4, 8, 32]),
            max_num_requests=rng.choice([1, 3, 8]), tail_len=rng.choice([0, 5]),
            num_layers=rng.choice([1, 3]), piece_rows=rng.choice([4, 8, 1000]),
            unit_len=rng.choice([1, 3, 4]),
            step_budget_s=rng.choice([None, 0.004, 0.02]), burst_s=rng.choice([0.0, 0.01, 1.0]),
            tiers=random_tiers(random.Random(1000 + seed)),
            num_stages=random.Random(3000 + seed).choice([1, 1, 2, 4]))
        self.scheduler = Scheduler(config)
        self.runner = FakeRunner(
            num_blocks=config.num_blocks, block_size=block_size,
            prefill_chunk_len=config.prefill_chunk_len, tail_len=config.tail_len,
            num_stages=config.num_stages)
        self.runner.places.rng = random.Random(2000 + seed)
        self.depth = rng.choice([1, 2, 3, MAX_SHORT_STEPS])
        self.queue = deque[ScheduledBatch]()
        self.alive = dict[str, Request]()
        self.stems = [[rng.randrange(50) for _ in range(60)] for _ in range(3)]
        self.num_events = self.num_finished = self.num_cached = self.num_paused = 0
        self.num_bursts = 0

    def happen(self) -> None:
        """One random event."""
        self.num_events += 1
        kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "arrive":
            self.arrive(self.rng.randrange(1, 12))
        elif kind == "oversize":
            self.arrive(self.rng.randrange(90, 200))
        elif kind == "abort":
            self.scheduler.abort(self.rng.choice([*self.alive, "never seen"]))
            self.settle(self.scheduler.take_updates())
        elif kind == "interrupt":
            self.scheduler.drop_in_flight()
            self.settle(self.scheduler.take_updates())
        else:
            self.step()
        self.check()

    def arrive(self, max_tokens: int) -> None:
        """A request that continues a known text or diverges from it somewhere."""
        rng = self.rng
        stem, fork = rng.choice(self.stems), rng.randrange(1, min(60, self.config.longest_len))
        prompt = [*stem[:fork], rng.randrange(50), *stem[fork + 1 : fork + rng.randrange(1, 30)]]
        schema = "{}" if rng.random() < 0.1 else None
        request = make_request(
            str(self.num_events), prompt, sparse=rng.random() < 0.4, max_tokens=max_tokens,
            json_schema=schema)
        if request.reserved_len > self.config.longest_len:
            with pytest.raises(PromptTooLongError):
                self.scheduler.add(request)
        else:
            self.scheduler.add(request)
            self.alive[request.request_id] = request

    def step(self) -> None:
        """Fill the pipeline, then let the runner finish its oldest step."""
        while len(self.queue) < self.depth:
            batch = self.scheduler.schedule()
            if batch is None:
                break
            self.queue.append(batch)
            if not batch.slices:
                break
        if self.queue:
            batch = self.queue.popleft()
            self.num_paused += any(i.pieces and not i.pieces.is_last for i in batch.slices)
            self.num_bursts += batch.repeats > 1
            self.settle(self.scheduler.apply(self.runner.execute(batch)))

    def check(self) -> None:
        """Recount; and blocks that a step in flight writes still belong to its requests."""
        self.scheduler.check()
        for batch in self.queue:
            for item in batch.slices if batch.epoch == self.scheduler.epoch else ():
                owner = self.scheduler._running[item.request_id]
                assert owner.block_ids == item.block_ids and owner.slot == item.slot

    def settle(self, updates: Iterable[Update]) -> None:
        """Check finished requests and forget them."""
        for update in updates:
            if update.finish_reason is None:
                continue
            request = self.alive.pop(update.request_id)
            wanted = complete(request.prompt_ids, request.params)
            self.num_cached += request.num_cached_tokens
            if update.finish_reason == "abort":
                assert list(request.output_ids) == wanted[: len(request.output_ids)]
            else:
                assert list(request.output_ids) == wanted
                self.num_finished += 1


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_schedule_gives_the_answers_of_each_request_alone(seed: int) -> None:
    world = World(seed)
    for _ in range(EVENTS):
        world.happen()
    while not world.scheduler.is_idle or world.queue:
        world.step()
    world.scheduler.check()
    assert not world.alive and world.num_finished > 5, f"seed {seed}"
    assert world.scheduler.pool.num_available == world.config.num_blocks


def test_the_fuzz_meets_what_it_is_for() -> None:
    """Hits, pauses, bursts and run-ahead do occur, and there are as many events as promised."""
    assert SEEDS * EVENTS >= 10_000
    worlds = [World(seed) for seed in range(9)]
    for world in worlds:
        for _ in range(EVENTS):
            world.happen()
    assert sum(world.num_cached for world in worlds) > 100
    assert sum(world.num_paused for world in worlds) > 10
    assert sum(world.num_bursts for world in worlds) > 50
    counts = sum((world.runner.places.counts for world in worlds), Counter[str]())
    assert min(counts[kind] for kind in ("save", "load", "read", "write", "drop")) > 20, counts
    assert counts["failure"] > 10
    assert any(item.is_run_ahead for world in worlds for batch in world.runner.batches
               for item in batch.slices)
