"""An engine decided from a checkpoint, or from a model's facts alone."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.attention.sparsity import SparsityPlan
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.control.latency import Costs, Forecast
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.request import Request, SamplingParams
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.setup.prior_costs import sparse_border
from longspan.errors import NotEnoughMemoryError
from tests.doubles import write_checkpoint

NOWHERE = Path("nowhere")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, dual_chunk_attention_config={
        "chunk_size": 640, "local_size": 128, "original_max_position_embeddings": 512})


@pytest.mark.parametrize("has_plan", [False, True])
def test_a_model_and_its_checkpoint_make_the_same_engine(path: Path, has_plan: bool) -> None:
    config = EngineConfig(model=str(path), device="cpu", memory_gib=0.8, max_model_len=4000)
    plan = SparsityPlan.default(3, 4, vertical=64, slash=256) if has_plan else None
    if plan is not None:
        plan.save(path / "sparsity_plan.json")
    model = ModelConfig.from_dir(path)
    read = ResolvedEngine.resolve(config)
    made = ResolvedEngine.of(model, config, path=path, plan=plan)
    measured = read.memory.device  # what is free changes from one look to the next
    assert made.has_plan is has_plan
    assert replace(made, memory=replace(made.memory, device=measured)) == read
    with pytest.raises(NotEnoughMemoryError, match="needs"):
        ResolvedEngine.of(model, replace(config, memory_gib=0.01), path=NOWHERE, plan=plan)


def test_an_engine_of_random_weights_needs_no_checkpoint(path: Path) -> None:
    config = EngineConfig(model="tiny", device="cpu", weights="random", attention="sparse",
                          memory_gib=0.8, prefill_chunk_len=512, max_model_len=2000)
    engine = ResolvedEngine.of(ModelConfig.from_dir(path), config, path=NOWHERE, plan=None)
    runner = engine.load_runner()
    assert len(runner.caches) == 3 and runner.caches[0].k.shape[0] == engine.memory.num_blocks
    loop = Loop(Scheduler(engine.scheduler_config()), runner.transport())
    loop.add(Request(request_id="0", prompt_ids=array("i", range(200)) * 5, sparse=True,
                     params=SamplingParams(max_tokens=3, ignore_eos=True)))
    found = list[int | None]()
    while not loop.is_idle:
        found += [update.token_id for update in loop.turn().updates]
    assert len([token for token in found if token is not None]) == 3


def test_on_cpus_the_border_between_dense_and_sparse_is_where_sparse_is_shorter() -> None:
    """No prompt is slower than one that is longer: not just under the checkpoint's threshold."""
    engine = ResolvedEngine.resolve(EngineConfig(model="nano", device="cpu", max_model_len=65_536))
    border = engine.sparse_threshold
    assert engine.model.sparse_threshold == 32_768 and 16_384 <= border < 32_768
    intake, config = engine.intake(), engine.scheduler_config()
    assert intake.sparse_threshold == config.sparse_above == border
    forecast = Forecast(
        costs=config.prior, block_size=config.block_size, sparse_above=border,
        prefill_chunk_len=config.prefill_chunk_len, tail_len=config.tail_len)
    assert forecast.prefill_s(0, 32_768) * 2 < replace(
        forecast, sparse_above=32_768).prefill_s(0, 32_768)
    assert forecast.prefill_s(0, border) <= forecast.prefill_s(0, 32_768) * 1.5
    eos: frozenset[int] = frozenset()
    made = [intake.make("x", [1] * length, SamplingParams(), eos)
            for length in (border, border + 1)]
    assert [request.sparse for request in made] == [False, True]


@pytest.mark.parametrize(("dense_a", "expected"), [(0.0, 32_768), (1.0, 16_384), (3.2e-8, 24_576)])
def test_the_border_follows_the_latency_model(dense_a: float, expected: int) -> None:
    costs = Costs(dense=(0.0, 1e-3, dense_a), sparse=(0.0, 1.43e-3, 0.0, 0.0))
    found = sparse_border(costs, 32_768, tail_len=0, block_size=128, prefill_chunk_len=8192)
    assert found == pytest.approx(expected, abs=1100)
