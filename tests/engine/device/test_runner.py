"""Runner on a tiny random model: stages, chunks, batches and plans."""

from __future__ import annotations

import dataclasses
import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from longspan.attention.sparsity import SparsityPlan, needs_means
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.device.batch import build_batch
from longspan.engine.device.memory import DeviceMemory, plan_memory
from longspan.engine.device.runner import Runner
from longspan.engine.resolve import resolve_positions
from longspan.engine.setup.engine_plan import resolve_plan
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice
from longspan.errors import LongspanError
from tests.doubles import write_checkpoint
from tests.engine.device.runners import RELEASED, compute_by_the_specification, fill_history

BLOCK = 8
GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
DCA: dict[str, Any] = {
    "chunk_size": 48, "local_size": 16, "original_max_position_embeddings": 40}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model"), num_hidden_layers=5, dual_chunk_attention_config=DCA)


def load(
    path: Path, num_stages: int = 1, plan: SparsityPlan | None = None, max_model_len: int = 256,
    num_blocks: int = 0,
) -> Runner:
    config = EngineConfig(
        model=str(path), device="cpu", dtype="float32", prefill_chunk_len=32, block_size=BLOCK,
        max_model_len=max_model_len, max_num_requests=64)
    model = ModelConfig.from_dir(path)
    memory = plan_memory(model, config, max_step_tokens=64, means=needs_means(plan),
                         device=DeviceMemory(total_bytes=2**34, free_bytes=2**34))
    if num_blocks:
        memory = dataclasses.replace(memory, num_blocks=num_blocks)
    return Runner.load(path, model, config, memory, plan=plan, num_stages=num_stages,
                       dca=resolve_positions("auto", model))


def prompt_of(length: int) -> array[int]:
    generator = torch.Generator().manual_seed(length)
    return array("i", torch.randint(256, (length,), generator=generator).tolist())


def make_slice(
    prompt: array[int], start: int, stop: int, blocks: list[int], sparse: bool = False,
) -> ScheduledSlice:
    return ScheduledSlice(
        request_id="a", token_ids=prompt[start:stop], cached_len=start, prompt_len=len(prompt),
        block_ids=blocks, sparse=sparse, sampling=GREEDY if stop == len(prompt) else None)


def logits_of(runner: Runner, *slices: ScheduledSlice) -> Tensor:
    batch = ScheduledBatch(step_id=0, slices=slices)
    with torch.inference_mode():
        logits = runner.forward(build_batch(
            batch, block_size=BLOCK, head_dim=runner._head_dim, dca=runner._dca, device="cpu"))
    assert logits is not None
    return logits


def prefill(runner: Runner, prompt: array[int], cuts: list[int], sparse: bool = False) -> Tensor:
    """Logits after the last prompt token, computed in pieces."""
    blocks = list(range(3, 3 + -(-len(prompt) // BLOCK)))
    for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
        step = ScheduledBatch(
            step_id=0, slices=(make_slice(prompt, start, stop, blocks, sparse),))
        if stop < len(prompt):
            assert runner.execute(step).token_ids == ()
    return logits_of(runner, make_slice(prompt, cuts[-2] if cuts[1:] else 0, len(prompt), blocks,
                                        sparse))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_stages_give_identical_logits(path: Path, num_stages: int, sparse: bool) -> None:
    prompt = prompt_of(150)
    plan = SparsityPlan.default(5, 4, vertical=8, slash=16) if sparse else None
    whole, staged = load(path, 1, plan), load(path, num_stages, plan)
    cuts = [32, 64, 96, 128, 150]
    assert torch.equal(prefill(whole, prompt, cuts, sparse), prefill(staged, prompt, cuts, sparse))


def test_repeats_are_the_steps_one_by_one(path: Path) -> None:
    runner, prompts = load(path), [prompt_of(20), prompt_of(33)]

    def step(index: int, repeats: int = 1) -> tuple[int, ...]:
        slices = tuple(ScheduledSlice(
            request_id=str(slot), slot=slot, prompt_len=len(prompt), sparse=False,
            token_ids=array("i") if index else prompt, sampling=GREEDY,
            cached_len=len(prompt) + index - 1 if index else 0,
            block_ids=list(range(6 * slot, 6 * slot + 6))) for slot, prompt in enumerate(prompts))
        return runner.execute(ScheduledBatch(step_id=0, slices=slices, repeats=repeats)).token_ids

    alone = [token for index in range(6) for token in step(index)]
    assert [*step(0), *step(1, repeats=5)] == alone


@pytest.mark.parametrize("cuts", [[32, 64, 96, 100], [8, 100], [1, 2, 3, 99, 100], [96, 100]])
def test_prefill_cuts_do_not_matter_when_dense(path: Path, cuts: list[int]) -> None:
    prompt, runner = prompt_of(100), load(path)
    torch.testing.assert_close(
        prefill(runner, prompt, cuts), prefill(runner, prompt, [100]), rtol=1e-4, atol=1e-4)


def test_neighbours_in_the_batch_do_not_matter(path: Path) -> None:
    runner, long, short = load(path), prompt_of(60), prompt_of(20)
    parts = (make_slice(long, 0, 60, list(range(10, 18))), make_slice(short, 0, 20, [2, 5, 1]))
    together = logits_of(runner, *parts)
    alone = torch.cat([logits_of(runner, part) for part in parts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_uninitialised_cache_never_reaches_the_result(path: Path) -> None:
    prompt, runner = prompt_of(100), load(path)
    clean = prefill(runner, prompt, [64, 100])
    for stage in runner._stages:
        for cache in stage.caches:
            cache.k.fill_(float("nan"))
            cache.v.fill_(float("nan"))
    assert torch.equal(prefill(runner, prompt, [64, 100]), clean)


def test_pair_counts_come_with_the_last_prefill_chunk(path: Path) -> None:
    prompt, runner = prompt_of(40), load(path)
    blocks = list(range(5))
    first = runner.execute(ScheduledBatch(
        step_id=0, slices=(make_slice(prompt, 0, 32, blocks),)))
    last = runner.execute(ScheduledBatch(
        step_id=1, slices=(make_slice(prompt, 32, 40, blocks),)))
    assert (first.causal_pairs, first.token_ids) == (0.0, ())
    whole_layers, last_layer = 4 * 4 * 40 * 41 / 2, 4 * 40  # the last layer: one query, 4 heads
    assert last.causal_pairs == last.kept_pairs == whole_layers + last_layer
    assert len(last.token_ids) == 1 and runner.peak_memory_bytes() > 0


def test_plan_sources(tmp_path: Path) -> None:
    budgets = [{str(head): ["vertical_and_slash", 5, 6, 1.0] for head in range(4)}] * 3
    write_checkpoint(tmp_path, dual_chunk_attention_config={
        **DCA, "sparse_attention_config": budgets, "sparse_attention_last_q": 32})
    model = ModelConfig.from_dir(tmp_path)
    config = EngineConfig(model="m")
    released = resolve_plan(tmp_path, model, config)
    assert released is not None and (released.vertical[0][0], released.probe_last) == (5, 32)
    SparsityPlan.default(3, 4, vertical=7).save(tmp_path / "sparsity_plan.json")
    beside = resolve_plan(tmp_path, model, config)
    assert beside is not None and beside.vertical[0][0] == 7
    other = tmp_path / "other.json"
    other.write_text(json.dumps(budgets[:2]))
    with pytest.raises(LongspanError, match="2 layers of 4 heads, the model has 3 of 4"):
        resolve_plan(tmp_path, model, EngineConfig(model="m", sparsity_plan=str(other)))


@pytest.mark.parametrize("correction", [True, False])
def test_blocks_have_means_where_the_plan_corrects_with_them(path: Path, correction: bool) -> None:
    """Else neither their memory nor their computation is spent, and sparse prefill works alike."""
    plan = dataclasses.replace(
        SparsityPlan.default(5, 4, vertical=8, slash=16), mean_correction=correction)
    runner = load(path, 1, plan)
    assert all((cache.k_mean is not None) == (cache.v_mean is not None) == correction
               for stage in runner._stages for cache in stage.caches)
    assert prefill(runner, prompt_of(90), [32, 64], sparse=True).isfinite().all()


def test_no_plan(path: Path) -> None:
    assert resolve_plan(path, ModelConfig.from_dir(path), EngineConfig(model="m")) is None


def test_steps_run_ahead_of_their_tokens(path: Path) -> None:
    """Launched before the results of the steps before are looked at: the same tokens."""
    runner, prompts = load(path), [prompt_of(20), prompt_of(33)]

    def row(slot: int, step: int, token: int | None) -> ScheduledSlice:
        prompt, blocks = prompts[slot], list(range(8 * slot, 8 * slot + 8))
        if step == 0:
            return replace(make_slice(prompt, 0, len(prompt), blocks), slot=slot)
        return ScheduledSlice(
            request_id="ab"[slot], slot=slot, cached_len=len(prompt) + step - 1,
            token_ids=array("i", [] if token is None else [token]), prompt_len=len(prompt),
            block_ids=blocks, sparse=False, sampling=GREEDY)

    def answers(ahead: bool) -> list[tuple[int, ...]]:
        launched, order, known = [], (0, 1), dict[int, int]()
        for step in range(6):
            batch = ScheduledBatch(step_id=step, epoch=3, slices=tuple(
                row(slot, step, known.get(slot)) for slot in order))
            launched.append(runner.launch(batch))
            if not ahead:
                known = dict(zip(order, launched[-1].wait().token_ids, strict=True))
            order = order[::-1]  # places in the step change, slots do not
        results = [step.wait() for step in launched]
        assert [(r.step_id, r.epoch) for r in results] == [(step, 3) for step in range(6)]
        assert all(result.elapsed_s > 0 for result in results)
        return [result.token_ids for result in results]

    found = answers(ahead=True)
    assert found == answers(ahead=False) and len(set(found)) > 1


@pytest.mark.parametrize("dca", RELEASED)
def test_steps_behind_released_strides(
    tmp_path: Path, dca: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt of three DCA chunks, of which the last rows of the second are computed, and all of
    the third, in two slices and two decode steps. A few blocks are the history, again and again."""
    write_checkpoint(tmp_path, num_hidden_layers=2, dual_chunk_attention_config=dca,
                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1 << 20)
    border = 2 * (dca["chunk_size"] - dca["local_size"])
    begin, prompt, history = border - BLOCK, prompt_of(border + 4), list(range(32))
    blocks = [history[index * 7 % 32] for index in range(begin // BLOCK)] + [40, 37, 38]

    def answers() -> Tensor:
        runner = load(tmp_path, 2, max_model_len=1 << 20, num_blocks=48)
        fill_history(runner, history)
        logits = [logits_of(runner, make_slice(prompt[:stop], start, stop, blocks))
                  for start, stop in ((begin, border - 1), (border - 1, border + 4))]
        logits += [logits_of(runner, ScheduledSlice(
            request_id="a", token_ids=array("i", [at % 256]), cached_len=at, prompt_len=len(prompt),
            block_ids=blocks, sparse=False, sampling=GREEDY)) for at in (border + 4, border + 5)]
        return torch.cat(logits)

    found = answers()
    compute_by_the_specification(monkeypatch, dca)
    # Sums over half a million keys agree to 1e-5, which these layers amplify a hundredfold; with a
    # stride that is one block shorter, or another clamp, logits differ by more than 1.
    torch.testing.assert_close(found, answers(), rtol=0, atol=2e-2)
