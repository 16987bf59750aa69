"""Host memory and disk in the scheduler: what is loaded, what is computed, who waits for what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from longspan.engine.control import tiers
from longspan.engine.control.copy_queue import TierConfig
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.kv_file import StoredRun
from longspan.engine.request import Request
from tests.doubles import DeepTransport, FakeRunner, complete, make_request

SIZE, CHUNK = 4, 8
FIRST, SECOND = [number % 50 for number in range(48)], [7 * number % 50 for number in range(48)]


class Engine:
    """A scheduler and a fake runner whose device holds one prompt and a little."""

    def __init__(
        self, *, num_blocks: int = 16, max_model_len: int = 64, **tiers: Any,
    ) -> None:
        config = {"num_slots": 40, "keeps_host": True, "block_bytes": 100,
                  "copy_bytes_per_s": 1e9, "min_written_len": 0, **tiers}
        self.scheduler = Scheduler(SchedulerConfig(
            num_blocks=num_blocks, block_size=SIZE, max_model_len=max_model_len,
            prefill_chunk_len=CHUNK, max_num_requests=4, tiers=TierConfig(**config)))
        self.runner = FakeRunner(
            num_blocks=num_blocks, block_size=SIZE, prefill_chunk_len=CHUNK)
        self.loop = Loop(self.scheduler, DeepTransport(self.runner, 1))
        self.numbers = iter(range(100))
        self.finished = list[str]()

    def add(self, prompt: Sequence[int], **params: Any) -> Request:
        """Hand in a prompt."""
        request = make_request(str(next(self.numbers)), prompt, **{"max_tokens": 4, **params})
        self.loop.add(request)
        return request

    def turn(self) -> None:
        """One turn; notes who has ended."""
        for update in self.loop.turn().updates:
            if update.finish_reason is not None:
                self.finished.append(update.request_id)
        self.scheduler.check()

    def ask(self, prompt: Sequence[int], **params: Any) -> Request:
        """Ask and wait until nothing is left to do; the answer is checked."""
        request = self.add(prompt, **params)
        while not self.loop.is_idle:
            self.turn()
        assert list(request.output_ids) == complete(prompt, request.params)
        return request


def test_what_is_evicted_comes_back_from_host_memory() -> None:
    engine = Engine()
    engine.ask(FIRST)
    engine.ask(SECOND)
    again = engine.ask(FIRST)
    assert again.num_cached_tokens == 44
    assert again.origin is not None and again.origin.num_disk_tokens == 0
    assert again.origin.num_host_tokens >= 32
    assert engine.runner.places.counts["save"] > 0 < engine.runner.places.counts["load"]


def test_two_prompts_change_places_through_a_host_that_holds_one_and_a_little() -> None:
    engine = Engine(num_blocks=13, num_slots=15)
    engine.ask(FIRST)
    engine.ask(SECOND)
    for _ in range(4):
        for prompt in (FIRST, SECOND):
            request = engine.ask(prompt)
            assert request.num_cached_tokens == 44, "nothing of it was lost"
            assert request.origin is not None and request.origin.num_host_tokens >= 40


@pytest.mark.parametrize("num_slots", [125, 102])
def test_prompts_that_change_places_do_not_wait_for_each_slot(num_slots: int) -> None:
    """Not even where the host is full of what the device has too, or has only just room."""
    engine = Engine(num_blocks=102, num_slots=num_slots, copy_bytes=100, max_model_len=404)
    prompts = [[number * factor % 50 for number in range(400)] for factor in (1, 7)]
    for prompt in prompts:
        engine.ask(prompt)
    for _ in range(2):
        for prompt in prompts:
            before = len(engine.runner.batches)
            request = engine.ask(prompt)
            assert len(engine.runner.batches) - before < 60, "100 copies in each direction"
            assert request.num_cached_tokens >= (396 if num_slots == 125 else 384)
    assert engine.scheduler.tiers.host.num_known > 90, "what is saved anew can be found"


def test_where_the_host_holds_less_the_beginning_is_kept() -> None:
    engine = Engine(num_blocks=13, num_slots=6)
    engine.ask(FIRST)
    hashes = engine.ask(SECOND).block_hashes
    engine.ask(FIRST)
    places = [engine.scheduler.tiers.place(value) for value in hashes[:12]]
    kept = places.index("")
    assert kept >= 4 and set(places[:kept]) == {"host"}, places


def test_what_is_sooner_computed_is_computed() -> None:
    engine = Engine(copy_bytes_per_s=100.0)  # a second for each block
    engine.ask(FIRST)
    engine.ask(SECOND)
    assert engine.runner.places.counts["load"] == 0
    again = engine.ask(FIRST)
    assert engine.runner.places.counts["load"] == 0 and again.origin is None
    assert again.num_cached_tokens <= SIZE * 4, "what was still on the device"


def test_a_later_engine_reads_the_files_of_an_earlier_one_and_mends_the_index() -> None:
    engine = Engine(folder="nowhere", disk_bytes=10**6, keeps_host=False)
    engine.ask(FIRST)
    later = Engine(folder="nowhere", disk_bytes=10**6, keeps_host=False)
    later.runner.places.files = dict(engine.runner.places.files)
    for run in engine.scheduler.tiers.disk._runs.values():
        later.scheduler.tiers.disk.add(run)
    read = later.ask(FIRST)
    assert read.num_cached_tokens == 44
    assert read.origin is not None and read.origin.num_disk_tokens == 44
    lost = Engine(folder="nowhere", disk_bytes=10**6, keeps_host=False)
    for run in engine.scheduler.tiers.disk._runs.values():
        lost.scheduler.tiers.disk.add(run)
    computed = lost.ask(FIRST)
    assert computed.num_cached_tokens == 0, "no file was there after all"
    assert lost.scheduler.tiers.disk.num_known >= 11, "it was written anew"


def test_others_run_while_a_prefix_is_loaded() -> None:
    engine = Engine(num_blocks=24, copy_bytes=100, copy_s=1e-9)  # one block at a time
    engine.ask(FIRST)
    engine.ask(SECOND)
    engine.ask([*SECOND[:40], 1, 2, 3])
    short = engine.add([5] * 3, max_tokens=3, ignore_eos=True)
    engine.turn()
    long = engine.add(FIRST)
    num_tokens_meanwhile = 0
    while not long.output_ids:
        before = len(short.output_ids)
        engine.turn()
        if long.num_transfers:
            num_tokens_meanwhile += len(short.output_ids) - before
    assert num_tokens_meanwhile > 0
    while not engine.loop.is_idle:
        engine.turn()


def test_a_request_that_is_cancelled_while_it_loads_gives_everything_back() -> None:
    engine = Engine(copy_bytes=100, copy_s=1e-9)
    engine.ask(FIRST)
    engine.ask(SECOND)
    request = engine.add(FIRST)
    while not request.num_transfers:
        engine.turn()
    engine.loop.abort(request.request_id)
    while not engine.loop.is_idle:
        engine.turn()
    assert request.finish_reason == "abort" and not request.block_ids
    assert engine.scheduler.pool.num_available == 16
    assert engine.scheduler.tiers.host.num_available == 40
    engine.ask(FIRST)


def test_a_cancelled_prefill_keeps_the_chunk_in_flight() -> None:
    engine = Engine()
    request = engine.add(FIRST)
    engine.loop._receive()
    batch = engine.scheduler.schedule()
    assert batch is not None and batch.slices[0].context_len == CHUNK
    engine.scheduler.abort(request.request_id)
    engine.scheduler.apply(engine.runner.execute(batch))
    assert engine.ask(FIRST).num_cached_tokens == CHUNK


def test_a_smaller_budget_than_before_deletes_what_is_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, not when something is written again."""
    runs = [StoredRun(name=name, key=b"other", hashes=(), num_bytes=400) for name in "abc"]
    monkeypatch.setattr(tiers, "index_of", lambda *_: runs)
    engine = Engine(folder="nowhere", disk_bytes=900, min_written_len=10**6)
    engine.ask(FIRST)
    assert engine.runner.places.counts["drop"] == 1
    assert engine.scheduler.tiers.disk.num_bytes == 800


def test_the_queue_of_runs_is_bounded() -> None:
    engine = Engine(folder="nowhere", disk_bytes=10**6)
    writer = engine.scheduler.tiers._writer
    for number in range(60):
        request = make_request("r", [number] * 48)
        request.block_hashes = [bytes([number, index] * 8) for index in range(12)]
        request.num_registered = 12
        writer.note(request, is_over=True)
    assert len(writer._pending) <= writer._max_pending
    assert writer._pending == {value for run in writer._runs for value in run.hashes}
