"""A server that measures itself tells of it when it is done, and not before."""

from __future__ import annotations

from typing import Any

from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.control.transport import LocalTransport
from longspan.engine.processes.serving_loop import ServingLoop
from longspan.engine.processes.wire import Add, Close, Command, LoadChanged
from tests.doubles import FakeRunner, make_request

CONFIG = SchedulerConfig(
    num_blocks=64, block_size=4, max_model_len=200, prefill_chunk_len=32, max_num_requests=4,
    tail_len=5, num_layers=3, piece_rows=8, step_budget_s=1.0, sparse_above=40,
    self_measurement_len=100)


def serve() -> tuple[list[str], list[Any]]:
    """Serve one request. Returns whose steps were computed, and what the front end was told."""
    runner = FakeRunner(num_blocks=64, block_size=4, prefill_chunk_len=32, tail_len=5)
    waiting: list[Command] = [Close(), Add(make_request("somebody", [7, 8, 9], max_tokens=2))]

    def take(must_wait: bool) -> Command | None:
        return waiting.pop() if must_wait else None

    told = list[Any]()
    ServingLoop(Scheduler(CONFIG), LocalTransport(runner), take, told.append).run()
    return [item.request_id for batch in runner.batches for item in batch.slices], told


def test_its_own_prompts_are_no_load_and_cold_times_no_forecast() -> None:
    computed, told = serve()
    loads = [one.load for one in told if isinstance(one, LoadChanged)]
    assert loads[0].forecast is None and loads[1].forecast is not None
    assert not loads[0].num_running and not loads[1].num_running
    assert {"self-measurement 3", "somebody"} <= set(computed)
