"""An engine decided from a checkpoint, or from a model's facts alone."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.attention.sparsity import SparsityPlan
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.request import Request, SamplingParams
from longspan.engine.setup.engine_plan import ResolvedEngine
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
