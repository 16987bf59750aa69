"""A sparse chunk in pieces: the same numbers wherever it pauses and whatever runs in between."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor

from longspan.attention.sparsity import SparsityPlan
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.control.chunking import chunk_pieces, chunk_stop, tail_start
from longspan.engine.control.ladder import Ladder
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.control.transport import LocalTransport
from longspan.engine.device.memory import DeviceMemory, plan_memory
from longspan.engine.device.runner import Runner
from longspan.engine.request import Request, SamplingParams
from longspan.engine.resolve import resolve_positions
from longspan.engine.step import Pieces, RowSampling, ScheduledBatch, ScheduledSlice
from tests.doubles import ComputedStep, write_checkpoint
from tests.engine.device.runners import RELEASED, compute_by_the_specification, fill_history

BLOCK, CHUNK, ROWS, TAIL, LAYERS = 8, 64, 16, 12, 4
DCA: dict[str, Any] = {
    "chunk_size": 96, "local_size": 32, "original_max_position_embeddings": 512}
"""Without a temperature: prompts of other lengths then share exactly."""
GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS,
                            dual_chunk_attention_config=DCA)


def make_plan(**changes: Any) -> SparsityPlan:
    return replace(SparsityPlan.default(LAYERS, 4), **{
        "vertical": ((8,) * 4,) * LAYERS, "slash": ((16,) * 4,) * LAYERS, "tail_len": TAIL,
        "probe_last": 8, "probe_strided": 4, "local": 8, **changes})


def load(
    path: Path, plan: SparsityPlan, num_stages: int = 1, max_model_len: int = 512,
    num_blocks: int = 0,
) -> Runner:
    config = EngineConfig(model=str(path), device="cpu", dtype="float32", prefill_chunk_len=CHUNK,
                          block_size=BLOCK, max_model_len=max_model_len, max_num_requests=8)
    model = ModelConfig.from_dir(path)
    memory = plan_memory(model, config, max_step_tokens=128, means=True,
                         device=DeviceMemory(total_bytes=2**34, free_bytes=2**34))
    memory = replace(memory, num_blocks=num_blocks or memory.num_blocks)
    runner = Runner.load(path, model, config, memory, plan=plan, num_stages=num_stages,
                         dca=resolve_positions("auto", model))
    runner._chunk._rows = ROWS  # several pieces in chunks of a test's size
    return runner


def prompt_of(length: int) -> array[int]:
    generator = torch.Generator().manual_seed(length)
    return array("i", torch.randint(256, (length,), generator=generator).tolist())


def slices_of(prompt: array[int], tail: int, stops: Iterable[int]) -> list[ScheduledSlice]:
    """A sparse prompt's slices; chunks pause after the numbers of pieces in ``stops``, which are
    taken in turn."""
    border = tail_start(len(prompt), tail, BLOCK)
    blocks, start, slices = list(range(64)), 0, list[ScheduledSlice]()
    pauses = itertools.cycle(stops)
    while start < len(prompt):
        stop = chunk_stop(start, len(prompt), Ladder(longest=CHUNK), border)
        base = ScheduledSlice(
            request_id="a", token_ids=prompt[start:stop], cached_len=start, sparse=True,
            prompt_len=len(prompt), block_ids=blocks, sampling=None)
        total = len(chunk_pieces(start, stop, num_layers=LAYERS, rows=ROWS))
        first = 0
        while first < total:
            last = min(total, first + next(pauses))
            slices.append(structs.replace(base, pieces=Pieces(first, last, total)))
            first = last
        start = stop
    slices[-1] = structs.replace(slices[-1], sampling=GREEDY)
    return slices


def logits_of(runner: Runner, slices: list[ScheduledSlice]) -> Tensor:
    """Logits of the last slice; a decode of another request runs along with every other slice."""
    found = None
    for index, item in enumerate(slices):
        neighbour = ScheduledSlice(
            request_id="b", token_ids=array("i", [index]), cached_len=index, prompt_len=1,
            block_ids=list(range(64, 96)), sparse=False, sampling=GREEDY, slot=1)
        batch = ScheduledBatch(step_id=index, slices=(item, neighbour) if index % 2 else (item,))
        with torch.inference_mode():
            apart = runner._advance(batch)
            found = runner.forward(runner._build(batch), apart)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("changes", [
    {}, {"mode": "paper", "mean_correction": False, "num_scouts": 0, "tail_len": 0},
    {"tail_len": 0}],
    ids=["tile", "paper", "no tail"])
def test_pauses_change_no_bit(path: Path, num_stages: int, changes: dict[str, Any]) -> None:
    plan = make_plan(**changes)
    prompt = prompt_of(211)
    reference = load(path, plan)
    whole = logits_of(reference, slices_of(prompt, plan.tail_len, [10**6]))
    runner = load(path, plan, num_stages)
    for stops in ([1], [7, 1, 4]):
        logits = logits_of(runner, slices_of(prompt, plan.tail_len, stops))
        assert torch.equal(logits, whole)
        num_blocks = len(prompt) // BLOCK
        for ours, wanted in zip(caches_of(runner), caches_of(reference), strict=True):
            assert torch.equal(ours[:num_blocks], wanted[:num_blocks])


def caches_of(runner: Runner) -> list[Tensor]:
    return [cache.k for stage in runner._stages for cache in stage.caches]


def test_row_pieces_agree_with_the_whole_forward(path: Path) -> None:
    """Packed, as transformers' adapter and dense neighbours run: no pieces at all."""
    plan, prompt = make_plan(), prompt_of(211)
    packed = [structs.replace(item, pieces=None) for item in slices_of(prompt, TAIL, [10**6])]
    wanted = logits_of(load(path, plan), packed)
    logits = logits_of(load(path, plan), slices_of(prompt, TAIL, [1]))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_chunk_that_begins_replaces_the_paused_one(path: Path) -> None:
    runner, plan_slices = load(path, make_plan()), slices_of(prompt_of(211), TAIL, [3])
    other = [structs.replace(item, request_id="c") for item in plan_slices]
    with torch.inference_mode():
        runner._advance(ScheduledBatch(step_id=0, slices=(plan_slices[0],)))
        runner._advance(ScheduledBatch(step_id=1, slices=(other[0],)))
        runner._advance(ScheduledBatch(step_id=2, slices=(other[1],)))
        with pytest.raises(AssertionError, match="'a'"):
            runner._advance(ScheduledBatch(step_id=3, slices=(plan_slices[1],)))


class _Clock:
    """Runs steps and claims random times for them, so that slices vary."""

    def __init__(self, runner: Runner, seed: int) -> None:
        self._runner, self._rng = runner, random.Random(seed)
        self.lens = list[tuple[int, ...]]()

    def launch(self, batch: ScheduledBatch) -> ComputedStep:
        """Compute."""
        self.lens.append(tuple(item.query_len for item in batch.slices))
        result = self._runner.execute(batch)
        return ComputedStep(structs.replace(result, elapsed_s=self._rng.uniform(0.01, 0.2)))


@pytest.mark.parametrize("seed", range(2))
def test_answers_do_not_depend_on_the_schedule(path: Path, seed: int) -> None:
    """Random budgets, times and neighbours: every answer is the one that the request gets alone."""
    rng = random.Random(seed)
    prompts = [prompt_of(rng.randrange(20, 260)) for _ in range(5)]
    prompts += [prompts[0], prompts[1][:150] + prompt_of(30)]
    runner = load(path, make_plan())
    alone = [_answers(runner, [prompt], None, 0)[0] for prompt in prompts]
    assert _answers(runner, prompts, 0.15, seed) == alone


def _answers(
    runner: Runner, prompts: list[array[int]], budget_s: float | None, seed: int,
) -> list[list[int]]:
    scheduler = Scheduler(SchedulerConfig(
        num_blocks=128, block_size=BLOCK, max_model_len=512, prefill_chunk_len=CHUNK,
        max_num_requests=8, tail_len=TAIL, num_layers=LAYERS, piece_rows=ROWS,
        step_budget_s=budget_s))
    clock = _Clock(runner, seed)
    loop = Loop(scheduler, LocalTransport(clock))
    requests = [Request(request_id=str(index), prompt_ids=prompt, sparse=len(prompt) > 70,
                        params=SamplingParams(max_tokens=6, ignore_eos=True))
                for index, prompt in enumerate(prompts)]
    for request in requests:
        loop.add(request)
        loop.turn()
    while not loop.is_idle:
        loop.turn()
    return [list(request.output_ids) for request in requests]


@pytest.mark.parametrize("dca", RELEASED)
def test_pauses_behind_released_strides(
    tmp_path: Path, dca: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sparse chunk that begins in the second DCA chunk and ends in the third, in pieces that
    pause after each, and by the specification. A few blocks are the history, again and again."""
    num_layers, num_heads, rows = 2, 2, 48
    write_checkpoint(tmp_path, num_hidden_layers=num_layers, dual_chunk_attention_config=dca,
                     num_attention_heads=num_heads, num_key_value_heads=1,
                     max_position_embeddings=1 << 20)
    plan = replace(SparsityPlan.default(num_layers, num_heads, vertical=8, slash=16), tail_len=0,
                   probe_last=8, probe_strided=4, local=8, num_scouts=0)
    border = 2 * (dca["chunk_size"] - dca["local_size"])
    begin = border // rows * rows
    assert begin < border and (border - begin) % BLOCK == 0
    prompt, history = prompt_of(begin + rows), list(range(32))
    blocks = [history[index * 7 % 32] for index in range(begin // BLOCK)] + list(range(32, 38))
    total = len(chunk_pieces(begin, len(prompt), num_layers=num_layers, rows=ROWS))

    def answer(num_pieces: int) -> Tensor:
        runner = load(tmp_path, plan, max_model_len=1 << 20, num_blocks=40)
        fill_history(runner, history)
        for first in range(0, total, num_pieces):
            item = ScheduledSlice(
                request_id="a", token_ids=prompt[begin:], cached_len=begin, sparse=True,
                prompt_len=len(prompt), block_ids=blocks, sampling=GREEDY,
                pieces=Pieces(first, min(first + num_pieces, total), total))
            batch = ScheduledBatch(step_id=first, slices=(item,))
            with torch.inference_mode():
                apart = runner._advance(batch)
                logits = runner.forward(runner._build(batch), apart)
        assert logits is not None
        return torch.cat([logits.flatten(), *(k[32:38].flatten() for k in caches_of(runner))])

    whole = answer(total)
    assert torch.equal(answer(1), whole)
    compute_by_the_specification(monkeypatch, dca)
    torch.testing.assert_close(whole, answer(total), rtol=1e-3, atol=1e-3)
