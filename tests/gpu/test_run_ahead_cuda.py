"""Decode steps launched before the results of earlier ones are looked at: same tokens, and the host
never waits in between."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from longspan.config import EngineConfig
from longspan.engine.device.graphs import BATCH_SIZES
from longspan.engine.device.launched_step import LaunchedStep
from longspan.engine.device.runner import Runner
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice, StepResult
from tests.doubles import write_checkpoint
from tests.gpu.syncs import no_syncs

pytestmark = pytest.mark.gpu

BLOCK, NUM_STEPS, ROOM = 16, 24, 8  # ROOM: blocks of each request
GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
WARM = RowSampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=7)
PROMPTS = [array("i", [(7 * slot + 3 * place) % 250 for place in range(20 + 9 * slot)])
           for slot in range(3)]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    path: Path = write_checkpoint(
        tmp_path_factory.mktemp("model"), hidden_size=256, intermediate_size=256)
    resolved = ResolvedEngine.resolve(EngineConfig(
        model=str(path), device="cuda", block_size=BLOCK, prefill_chunk_len=64, memory_gib=2.0,
        max_model_len=1024))
    runner = resolved.load_alone()
    assert isinstance(runner, Runner)
    runner.record_graphs()
    yield runner
    runner.close()


def row(slot: int, step: int, token: int | None, sampling: RowSampling) -> ScheduledSlice:
    prompt = PROMPTS[slot]
    known = [] if token is None else [token]
    return ScheduledSlice(
        request_id=str(slot), slot=slot, prompt_len=len(prompt), sparse=False, sampling=sampling,
        token_ids=prompt if step == 0 else array("i", known),
        cached_len=0 if step == 0 else len(prompt) + step - 1,
        block_ids=range(ROOM * slot, ROOM * (slot + 1)))


def launch(
    runner: Runner, step: int, known: dict[int, int], sampling: RowSampling, moves: bool
) -> tuple[list[int], LaunchedStep]:
    """Requests change places from step to step, so that each step is loaded from the host, or they
    keep them, so that the device goes on by itself; slots do not change."""
    order = [(slot + step) % 3 for slot in range(3)] if moves else [0, 1, 2]
    batch = ScheduledBatch(step_id=step, slices=tuple(
        row(slot, step, known.get(slot), sampling) for slot in order))
    return order, runner.launch(batch)


def by_slot(order: list[int], result: StepResult) -> dict[int, int]:
    return dict(zip(order, result.token_ids, strict=True))


def one_by_one(runner: Runner, sampling: RowSampling, moves: bool) -> list[dict[int, int]]:
    """Each step is told the tokens of the last one."""
    found = list[dict[int, int]]()
    for step in range(NUM_STEPS):
        order, launched = launch(runner, step, found[-1] if found else {}, sampling, moves)
        found.append(by_slot(order, launched.wait()))
    return found


@pytest.mark.parametrize("moves", [True, False], ids=["loaded", "continued"])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_steps_run_ahead(runner: Runner, sampling: RowSampling, moves: bool) -> None:
    assert runner._graphs is not None
    wanted = one_by_one(runner, sampling, moves)  # compiles what is needed; graphs are there
    launched = [launch(runner, 0, {}, sampling, moves)]
    with no_syncs():
        launched += [launch(runner, step, {}, sampling, moves) for step in range(1, NUM_STEPS)]
    results = [(order, step.wait()) for order, step in launched]
    assert [by_slot(order, result) for order, result in results] == wanted
    assert len({tuple(sorted(tokens.items())) for tokens in wanted}) > 1
    assert all(0 < result.elapsed_s < 1 for _, result in results)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_several_steps_at_a_time(runner: Runner, sampling: RowSampling) -> None:
    wanted = one_by_one(runner, sampling, False)
    order, first = launch(runner, 0, {}, sampling, False)
    slices = tuple(row(slot, 1, None, sampling) for slot in order)
    rest = ScheduledBatch(step_id=1, slices=slices, repeats=NUM_STEPS - 1)
    with no_syncs():
        launched = runner.launch(rest)
    tokens = launched.wait().token_ids
    found = [by_slot(order, first.wait()), *(
        dict(zip(order, tokens[i : i + 3], strict=True)) for i in range(0, len(tokens), 3))]
    assert found == wanted


def test_a_server_records_nothing_later(runner: Runner) -> None:
    """All sizes, greedy and mixed, are there before the first step."""
    assert runner._graphs is not None
    before = dict(runner._graphs._graphs)
    assert len(before) == 2 * len(BATCH_SIZES)
    one_by_one(runner, GREEDY, moves=True)
    one_by_one(runner, WARM, moves=False)
    assert runner._graphs._graphs == before
