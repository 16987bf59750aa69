"""A server that measures itself: nobody waits for that, and nobody hears of what it is not."""

from __future__ import annotations

from typing import Any

import pytest

from longspan.engine.control.loop import LocalTransport
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.processes.serving_loop import ServingLoop
from longspan.engine.processes.wire import Add, Close, Command, LoadChanged
from tests.doubles import FakeRunner, make_request

CONFIG = SchedulerConfig(
    num_blocks=64, block_size=4, max_model_len=200, prefill_chunk_len=32, max_num_requests=4,
    tail_len=5, num_layers=3, piece_rows=8, step_budget_s=1.0, sparse_above=40,
    self_measurement_len=100)


def serve(arrival: int) -> tuple[list[str], list[Any]]:
    """Serve one request, which comes after so many steps. Returns whose steps were computed, and
    what the front end was told."""
    runner = FakeRunner(num_blocks=64, block_size=4, prefill_chunk_len=32, tail_len=5)
    waiting: list[Command] = [Close(), Add(make_request("somebody", [7, 8, 9], max_tokens=2))]

    def take(must_wait: bool) -> Command | None:
        due = 0 if must_wait else arrival if len(waiting) == 2 else 10**9
        return waiting.pop() if waiting and len(runner.batches) >= due else None

    told = list[Any]()
    ServingLoop(Scheduler(CONFIG), LocalTransport(runner), take, told.append).run()
    return [item.request_id for batch in runner.batches for item in batch.slices], told


@pytest.mark.parametrize("arrival", [1, 4, 9])
def test_who_comes_meanwhile_does_not_wait(arrival: int) -> None:
    computed, _ = serve(arrival)
    assert computed.index("somebody") <= arrival + 2
    assert not any("self" in name for name in computed[computed.index("somebody"):])


def test_its_own_prompts_are_no_load_and_cold_times_no_forecast() -> None:
    computed, told = serve(10**9)
    loads = [one.load for one in told if isinstance(one, LoadChanged)]
    assert loads[0].forecast is None and loads[1].forecast is not None
    assert not loads[0].num_running and not loads[1].num_running
    assert {"self-measurement 3", "somebody"} <= set(computed)
