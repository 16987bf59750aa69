"""Scheduler: policy, exact numbers in refusals, and a seeded fuzz over a runner that checks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import LOOKAHEAD, Scheduler, SchedulerConfig
from longspan.engine.control.transport import LocalTransport
from longspan.engine.request import Request
from longspan.engine.step import ScheduledBatch, StepResult
from longspan.errors import PromptTooLongError
from tests.doubles import DeepTransport, FakeRunner, complete, make_request

CONFIG = SchedulerConfig(
    num_blocks=16, block_size=4, max_model_len=64, prefill_chunk_len=8, max_num_requests=4,
    tail_len=3)


def make_engine(
    config: SchedulerConfig = CONFIG, depth: int = 1,
) -> tuple[Loop, Scheduler, FakeRunner]:
    runner = FakeRunner(
        num_blocks=config.num_blocks, block_size=config.block_size,
        prefill_chunk_len=config.prefill_chunk_len, tail_len=config.tail_len)
    scheduler = Scheduler(config)
    transport = LocalTransport(runner) if depth == 1 else DeepTransport(runner, depth)
    return Loop(scheduler, transport), scheduler, runner


def run_all(loop: Loop, requests: list[Request]) -> None:
    for request in requests:
        loop.add(request)
    while not loop.is_idle:
        loop.turn()


def test_control_plane_loads_no_torch() -> None:
    code = "import sys, longspan, longspan.engine.control.loop"
    code += "\nlongspan.SamplingParams, longspan.EngineConfig"
    code += "\nsys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_refuses_what_never_fits() -> None:
    scheduler = Scheduler(CONFIG)
    with pytest.raises(PromptTooLongError) as error:
        scheduler.add(make_request("a", range(60), max_tokens=9))
    assert str(error.value) == (
        "prompt of 60 tokens plus max_tokens 9 is 69, over the limit of 64 tokens; "
        "ask for at most 4")
    with pytest.raises(PromptTooLongError, match="shorten the prompt by at least 2"):
        scheduler.add(make_request("a", range(65), max_tokens=1))
    scheduler.add(make_request("a", range(60), max_tokens=4))


def test_chunks_end_at_absolute_multiples() -> None:
    loop, _, runner = make_engine()
    run_all(loop, [make_request("a", range(1, 20), max_tokens=3, ignore_eos=True)])
    lens = [[item.query_len for item in batch.slices] for batch in runner.batches]
    assert lens == [[8], [8], [3], [1], [1]]
    assert [batch.step_id for batch in runner.batches] == [0, 1, 2, 3, 4]


def bursts(requests: list[Request], burst_s: float = 1.0) -> list[tuple[int, int]]:
    """Rows and repeats of each step that computes the requests."""
    loop, scheduler, runner = make_engine(replace(CONFIG, burst_s=burst_s))
    found = []
    schedule = scheduler.schedule

    def watched(in_flight_s: float = 0.0) -> ScheduledBatch | None:
        batch = schedule(in_flight_s)
        if batch is not None:
            found.append((len(batch.slices), batch.repeats))
        return batch

    scheduler.schedule = watched  # type: ignore[method-assign]
    run_all(loop, requests)
    for request in requests:
        assert list(request.output_ids) == complete(request.prompt_ids, request.params)
    return found


def test_short_decode_steps_are_sent_several_at_a_time() -> None:
    """As many as fit the time, eight at most, none past the first request's last token, and one
    where sampling needs the host; never with a prefill."""
    def request(name: str, max_tokens: int, **params: Any) -> Request:
        return make_request(name, [1, 2, 3], max_tokens=max_tokens, ignore_eos=True, **params)

    assert bursts([request("a", 21)]) == [(1, 1), (1, 8), (1, 8), (1, 4)]
    assert bursts([request("a", 6), request("b", 12)]) == [(2, 1), (2, 5), (1, 6)]
    assert bursts([request("a", 4)], burst_s=0.0) == [(1, 1)] * 4
    assert bursts([request("a", 4, logprobs=1)]) == [(1, 1)] * 4
    assert bursts([make_request("a", range(1, 20), max_tokens=3, ignore_eos=True)]) == [
        (1, 1), (1, 1), (1, 1), (1, 2)]


def test_a_burst_lasts_as_long_as_was_asked() -> None:
    """By what steps take: here 2.1 to 2.3 ms, of which three fit."""
    found = bursts([make_request("a", range(8), max_tokens=30, ignore_eos=True)], burst_s=0.007)
    assert found[-3:-1] == [(1, 3), (1, 3)]


def test_tokens_after_a_stop_in_a_burst_are_dropped() -> None:
    prompt, free = [5, 6, 7], make_request("x", [5, 6, 7], max_tokens=9, ignore_eos=True)
    stop = complete(free.prompt_ids, free.params)[3]
    request = make_request("a", prompt, max_tokens=9, ignore_eos=True, stop_token_ids=(stop,))
    other = make_request("b", [9, 9], max_tokens=9, ignore_eos=True)
    bursts([request, other])
    assert request.finish_reason == "stop" and len(request.output_ids) <= 4
    assert request.computed_len == len(prompt) + len(request.output_ids) - 1


def test_short_request_joins_the_next_step_of_a_long_prefill() -> None:
    loop, _, runner = make_engine()
    loop.add(make_request("long", range(1, 41), max_tokens=2))
    loop.turn()
    loop.add(make_request("short", [7, 7, 7], max_tokens=2, ignore_eos=True))
    report = loop.turn()
    assert [item.request_id for item in runner.batches[1].slices] == ["long", "short"]
    tokens = {update.request_id: update.token_id for update in report.updates}
    assert tokens["long"] is None and tokens["short"] is not None


def test_decodes_go_on_during_a_prefill() -> None:
    loop, _, runner = make_engine()
    loop.add(make_request("a", [5, 5], max_tokens=8, ignore_eos=True))
    loop.turn()
    loop.add(make_request("b", range(1, 33), max_tokens=1))
    loop.turn()
    assert [(i.request_id, i.query_len) for i in runner.batches[1].slices] == [("b", 8), ("a", 1)]


def test_joiners_fit_the_workspace() -> None:
    """A chunk and a half: a dense joiner is cut; a sparse one's chunk stays whole, and the head is
    cut."""
    for sparse, lens in ((False, [("a", 8), ("b", 4)]), (True, [("b", 8), ("a", 4)])):
        loop, _, runner = make_engine()
        loop.add(make_request("a", range(1, 21), max_tokens=1))
        loop.add(make_request("b", range(21, 41), max_tokens=1, sparse=sparse))
        loop.turn()
        assert [(i.request_id, i.query_len) for i in runner.batches[0].slices] == lens


def test_a_waiting_request_is_passed_only_so_often() -> None:
    loop, scheduler, runner = make_engine()
    loop.add(make_request("running", range(19, 49), max_tokens=10, ignore_eos=True))
    loop.turn()
    loop.add(make_request("big", range(1, 50), max_tokens=10))
    for index in range(3 * LOOKAHEAD):
        loop.add(make_request(f"s{index}", [9, index % 50], max_tokens=1))
    started: list[str] = []
    while not loop.is_idle:
        loop.turn()
        started += [i.request_id for i in runner.batches[-1].slices if i.request_id not in started]
    assert 1 < started.index("big") <= LOOKAHEAD + CONFIG.max_num_requests
    assert len(started) == 2 + 3 * LOOKAHEAD


def test_prefix_hits_recompute_the_last_prompt_token() -> None:
    loop, scheduler, runner = make_engine()
    first = make_request("a", range(1, 17), max_tokens=1)
    again = make_request("b", range(1, 17), max_tokens=1)
    run_all(loop, [first])
    run_all(loop, [again])
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 12)
    assert first.output_ids == again.output_ids
    assert runner.num_computed == 16 + 4


def test_sparse_hits_are_the_chunks_before_the_tail() -> None:
    loop, _, _ = make_engine()
    document = list(range(1, 31))
    first = make_request("a", [*document, 40], max_tokens=1, sparse=True)
    again = make_request("b", [*document, 41, 42], max_tokens=1, sparse=True)
    dense = make_request("c", [*document, 43], max_tokens=1)
    for request in (first, again, dense):
        run_all(loop, [request])
    assert (again.num_cached_tokens, dense.num_cached_tokens) == (28, 0)


def test_sparse_hits_never_mix_chunks_that_end_differently() -> None:
    """Keys of a sparse chunk depend on all of its tokens: blocks before a difference too."""
    config = replace(CONFIG, block_size=2, num_blocks=32, tail_len=0)
    loop, _, runner = make_engine(config)
    document = list(range(1, 33))
    other = [*document[:14], 40, *document[15:]]
    third = [*document, 41]
    for name, prompt in (("a", other), ("b", document), ("c", third)):
        run_all(loop, [make_request(name, prompt, max_tokens=1, sparse=True)])
    assert runner.num_computed == 32 + 24 + 1  # the runner has checked what "c" found


def test_table_of_a_hit_stays_one_ascending_run() -> None:
    """The short rest of another question about the document makes way."""
    loop, _, runner = make_engine(replace(CONFIG, block_size=1, num_blocks=64))
    run_all(loop, [make_request("a", range(1, 40), max_tokens=1)])
    run_all(loop, [make_request("b", [*range(1, 38), *range(40, 49)], max_tokens=1)])
    table = list(runner.batches[-1].slices[0].block_ids)
    assert table == list(range(table[0], table[0] + 47))


def test_a_follow_up_does_not_evict_the_document_behind_while_blocks_are_free() -> None:
    config = replace(CONFIG, block_size=1, num_blocks=1000, max_model_len=1000,
                     prefill_chunk_len=100)
    loop, scheduler, _ = make_engine(config)
    first, second = [1, *range(2, 401)], [2, *range(2, 401)]

    def cached(name: str, document: list[int], question: int, max_tokens: int) -> int:
        request = make_request(name, [*document, question], max_tokens=max_tokens, ignore_eos=True)
        run_all(loop, [request])
        return request.num_cached_tokens

    assert cached("a1", first, 1, 4) == 0
    assert cached("b1", second, 1, 4) == 0
    assert cached("b2", second, 2, 4) == 400
    assert cached("a2", first, 2, 40) == 400
    assert cached("b3", second, 3, 4) == 400
    assert cached("a3", first, 3, 4) == 400
    scheduler.check()


def test_results_out_of_order_are_our_own_fault() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(make_request("a", [1, 2], max_tokens=2))
    assert scheduler.schedule() is not None
    with pytest.raises(AssertionError):
        scheduler.apply(StepResult(step_id=1, token_ids=(3,)))


def test_abort_in_flight_keeps_blocks_until_the_step_returns() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(make_request("a", [1, 2], max_tokens=2))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.abort("a")
    scheduler.abort("a")
    assert scheduler.pool.num_available == 15
    updates = scheduler.apply(StepResult(step_id=0, token_ids=(3,)))
    assert [(u.finish_reason, u.token_id) for u in updates] == [("abort", None)]
    assert scheduler.pool.num_available == 16 and scheduler.is_idle
