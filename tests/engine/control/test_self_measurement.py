"""An engine that serves measures itself before the first request; the prior gives proportions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longspan.attention.sparsity import SparsityPlan
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.control.copy_queue import TierConfig
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.control.self_measurement import measure_itself
from longspan.engine.control.transport import LocalTransport
from longspan.engine.setup.prior_costs import prior_costs
from longspan.expert_config import ExpertConfig
from tests.doubles import MODEL, FakeRunner, make_request

CONFIG = SchedulerConfig(
    num_blocks=64, block_size=4, max_model_len=200, prefill_chunk_len=32, max_num_requests=4,
    tail_len=5, num_layers=3, piece_rows=8, step_budget_s=1.0)
SHAPE = ModelConfig(**{**MODEL, "hidden_size": 512, "intermediate_size": 896, "num_layers": 6,
                       "num_heads": 4, "head_dim": 128, "vocab_size": 4096})
RESOLVED = EngineConfig(model="m", device="cpu", dtype="float32", prefill_chunk_len=16_384)


@pytest.mark.parametrize(("sparse_above", "num_requests"), [(None, 3), (40, 4)])
def test_the_machine_is_measured(sparse_above: int | None, num_requests: int) -> None:
    scheduler = Scheduler(replace(CONFIG, self_measurement_len=100, sparse_above=sparse_above))
    runner = FakeRunner(num_blocks=64, block_size=4, prefill_chunk_len=32, tail_len=5)
    measure_itself(scheduler, Loop(scheduler, LocalTransport(runner)))
    assert scheduler.is_idle and scheduler.forecast is not None
    ids = {item.request_id for batch in runner.batches for item in batch.slices}
    assert len(ids) == num_requests
    assert any(item.pieces for b in runner.batches for item in b.slices) == bool(sparse_above)
    assert scheduler.latency.has_seen("dense") and not scheduler.latency.has_seen("sparse")
    # The fake's times: a millisecond, a token, and 10 us for each pair.
    work_s = sum(1e-3 * 32 + 1e-5 * 32 * (start + 32) for start in (0, 32, 64))
    assert scheduler.forecast.costs.dense_s(0, 96) == pytest.approx(work_s, rel=0.5)
    scheduler.check()


def test_what_it_computes_does_not_go_to_disk(tmp_path: Path) -> None:
    """A later start would read it from there, and measure nothing."""
    tiers = TierConfig(num_slots=32, folder=str(tmp_path), disk_bytes=1 << 20, min_written_len=8)
    scheduler = Scheduler(replace(CONFIG, self_measurement_len=100, tiers=tiers))
    runner = FakeRunner(num_blocks=64, block_size=4, prefill_chunk_len=32, tail_len=5)
    loop = Loop(scheduler, LocalTransport(runner))
    measure_itself(scheduler, loop)
    assert scheduler.is_idle and not runner.places.files
    loop.add(make_request("a", range(1, 60), max_tokens=1))
    while not loop.is_idle:
        loop.turn()
    assert runner.places.files, "others do"


def test_where_nothing_is_compiled_no_sparse_prompt_is_computed() -> None:
    scheduler = Scheduler(replace(CONFIG, self_measurement_len=100, sparse_above=40,
                                  warms_sparse=False))
    runner = FakeRunner(num_blocks=64, block_size=4, prefill_chunk_len=32, tail_len=5)
    measure_itself(scheduler, Loop(scheduler, LocalTransport(runner)))
    assert len({item.request_id for batch in runner.batches for item in batch.slices}) == 3


def test_without_a_length_nothing_is_computed() -> None:
    scheduler = Scheduler(CONFIG)
    runner = FakeRunner(num_blocks=64, block_size=4, prefill_chunk_len=32)
    measure_itself(scheduler, Loop(scheduler, LocalTransport(runner)))
    assert not runner.batches and scheduler.forecast is None


def test_prior_has_the_proportions_of_the_model() -> None:
    """nano on two cores was measured: 2.4e-4 s a token, 4.5e-8 s a squared token dense; 57 s for
    128K sparse. The prior need not know the speed, but the ratios within a factor of three."""
    plan = SparsityPlan(
        vertical=((256,) * 4,) * 6, slash=((768,) * 4,) * 6, probe_last=32, probe_strided=32)
    costs = prior_costs(SHAPE, RESOLVED, plan)
    assert 1 / 3 < (costs.dense[2] / costs.dense[1]) / (4.5e-8 / 2.4e-4) < 3
    sparse = sum(costs.sparse_s(start, 16_384) for start in range(0, 131_072, 16_384))
    assert 1 / 3 < (sparse / costs.dense_s(0, 131_072)) / (57.0 / 805.0) < 3
    assert costs.decode_s(1, 131_072) > costs.decode_s(1, 1) > 0


def test_prior_knows_the_device() -> None:
    gpu = prior_costs(SHAPE, replace(RESOLVED, device="cuda:0", dtype="bfloat16"), None)
    cpu = prior_costs(SHAPE, RESOLVED, None)
    assert gpu.dense_s(0, 32_768) < cpu.dense_s(0, 32_768) / 100


def test_first_guesses_of_experts_are_of_those_that_a_token_takes() -> None:
    experts = ExpertConfig(num_experts=16, num_chosen=2, expert_size=SHAPE.intermediate_size // 2)
    dense, routed = (prior_costs(shape, RESOLVED, None)
                     for shape in (SHAPE, replace(SHAPE, experts=experts)))
    assert routed.dense[1] == pytest.approx(dense.dense[1], rel=0.1)  # as many operations
    assert routed.decode[0] < dense.decode[0]  # what every step reads has no MLP in it
    assert routed.decode[1] > dense.decode[1]  # each token brings its own
