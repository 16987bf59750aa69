"""Block hashes of prompts: the same whoever works them out, and where it is done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longspan.engine.control import prefixes
from longspan.engine.control.prefixes import hash_prompt
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.processes.wire import Add, Codec, ToScheduler, encode
from longspan.engine.step import StepResult
from tests.doubles import make_request

CONFIG = SchedulerConfig(
    num_blocks=64, block_size=4, max_model_len=128, prefill_chunk_len=16, max_num_requests=4,
    tail_len=6)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_request_may_come_with_its_hashes(
    sparse: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As from a front end: the scheduler then hashes nothing, and finds the same prefixes."""
    plain = make_request("a", range(70), max_tokens=2, sparse=sparse)
    scheduler = Scheduler(CONFIG)
    scheduler.add(plain)
    scheduler.schedule()
    assert len(plain.block_hashes) == 70 // 4
    made = make_request("b", range(70), max_tokens=2, sparse=sparse)
    hash_prompt(made, CONFIG)
    assert made.block_hashes == plain.block_hashes
    sent = Codec(ToScheduler).decode(encode(Add(made))).request

    def refuse(*args: object) -> None:
        raise AssertionError("hashed a second time")

    monkeypatch.setattr(prefixes, "extend_hashes", refuse)
    other = Scheduler(CONFIG)
    other.add(sent)
    assert other.schedule() is not None and sent.block_hashes == plain.block_hashes


@pytest.mark.parametrize("length", [30, 40, 70])
def test_hashes_of_a_sparse_prompt_name_its_chunks(length: int) -> None:
    """Selections are functions of whole chunks: what another chunk length computed is not found."""
    def hashes(chunk: int, sparse: bool) -> list[bytes]:
        request = make_request("a", range(length), sparse=sparse)
        hash_prompt(request, replace(CONFIG, prefill_chunk_len=chunk))
        return list(request.block_hashes)

    short, long = hashes(16, True), hashes(32, True)
    shared = [one == other for one, other in zip(short, long, strict=True)]
    assert shared == [False] * len(shared)
    assert hashes(16, False) == hashes(32, False)


class CountingDict(dict[bytes, Any]):
    """Counts how often anybody looks a hash up."""

    num_lookups = 0

    def get(self, key: bytes, default: Any = None) -> Any:
        """As a dict does."""
        self.num_lookups += 1
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.num_lookups += 1
        return super().__contains__(key)


def step(scheduler: Scheduler) -> None:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.apply(StepResult(step_id=batch.step_id, elapsed_s=0.01, token_ids=tuple(
        7 for item in batch.slices if item.sampling is not None)))


def test_a_prefix_is_not_looked_up_again_while_nothing_was_lost() -> None:
    """Twenty questions about a document of 400 blocks wait for room, and others decode."""
    config = SchedulerConfig(num_blocks=500, block_size=1, max_model_len=500,
                             prefill_chunk_len=500, max_num_requests=64)
    scheduler = Scheduler(config)
    document = list(range(1, 401))
    for name, max_tokens in (("first", 2), ("decoding", 30)):
        scheduler.add(make_request(name, document, max_tokens=max_tokens, ignore_eos=True))
        step(scheduler)
        step(scheduler)
    waiting = [make_request(f"q{number}", [*document, number], max_tokens=90)
               for number in range(1, 21)]
    for request in waiting:
        scheduler.add(request)
    known = scheduler.pool._block_of = CountingDict(scheduler.pool._block_of)
    promises = scheduler._prefixes._promises = CountingDict(scheduler._prefixes._promises)
    step(scheduler)
    assert known.num_lookups >= 16 * 400
    known.num_lookups = promises.num_lookups = 0
    for _ in range(10):
        step(scheduler)
    assert known.num_lookups + promises.num_lookups < 10 * 16 * 8
    assert scheduler.load.num_waiting == 20
    scheduler.abort("decoding")
    step(scheduler)
    assert scheduler.load.num_waiting < 20 and waiting[0].num_cached_tokens == 400
    scheduler.check()


def test_what_was_found_is_looked_up_anew_when_some_of_it_is_evicted() -> None:
    """A waiting request is admitted with the prefix that there is by then."""
    config = SchedulerConfig(num_blocks=40, block_size=1, max_model_len=40, prefill_chunk_len=40,
                             max_num_requests=4)
    scheduler = Scheduler(config)
    document = list(range(1, 21))
    scheduler.add(make_request("first", document, max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("holds", [50], max_tokens=19, ignore_eos=True))
    late = make_request("late", [*document, 40], max_tokens=19)
    step(scheduler)
    scheduler.add(late)  # 20 blocks known, 20 to take, none free
    step(scheduler)
    scheduler.check()
    assert scheduler.load.num_waiting == 1
    scheduler.add(make_request("evicts", [60], max_tokens=4, ignore_eos=True))
    step(scheduler)
    assert scheduler.load.num_waiting == 1
    scheduler.check()
    scheduler.abort("holds")
    scheduler.abort("evicts")
    step(scheduler)
    assert late.num_cached_tokens == 15
    scheduler.check()
