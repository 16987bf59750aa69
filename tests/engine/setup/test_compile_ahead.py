"""What a server computes for its compilers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longspan.config import EngineConfig
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.control.transport import LocalTransport
from longspan.engine.request import Request
from longspan.engine.setup.compile_ahead import (
    NUM_QUERIES,
    TAIL_QUERIES,
    compile_steps,
    context_lens,
)
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.ops.geometry import num_scouts
from tests.doubles import make_request, write_checkpoint

CONFIG = SchedulerConfig(
    num_blocks=9_000, block_size=128, max_model_len=1_000_000, prefill_chunk_len=32_768,
    max_num_requests=4, tail_len=1_000, sparse_above=65_536)


def test_contexts_of_every_power_of_two() -> None:
    assert context_lens(CONFIG) == [1_024, 32_768, 65_536, 131_072, 262_144, 524_288, 999_936]
    assert context_lens(replace(CONFIG, num_blocks=300)) == [1_024, 32_768, 38_400]
    assert context_lens(replace(CONFIG, max_model_len=600)) == []


@pytest.mark.parametrize("shares_rows", [False, True])
@pytest.mark.parametrize("sparse_above", [None, 0])
def test_steps_stay_within_the_pool(sparse_above: int | None, shares_rows: bool) -> None:
    steps = list(compile_steps(
        replace(CONFIG, sparse_above=sparse_above), shares_rows=shares_rows))
    assert len(steps) == (17 if sparse_above is None else 24 + 6 * shares_rows)
    for step in steps:
        (item,) = step.slices
        assert 0 < item.query_len <= min(CONFIG.prefill_chunk_len, item.context_len)
        if item.sparse:  # as many scouts as a whole prefill chunk of this context has
            assert item.query_len >= NUM_QUERIES and item.query_len % CONFIG.block_size == 0
            assert item.query_len == TAIL_QUERIES or num_scouts(
                item.query_len, item.context_len, 128, 4096) >= num_scouts(
                min(item.context_len, CONFIG.prefill_chunk_len), item.context_len, 128, 4096) * 0.98
        assert max(item.block_ids) < CONFIG.num_blocks
        assert item.context_len == len(item.block_ids) * CONFIG.block_size
        is_last = item.context_len == 999_936
        if not (item.sparse and item.query_len == TAIL_QUERIES):
            assert is_last == (item.sampling is not None) == (item.prompt_len == item.context_len)


def test_steps_are_no_longer_than_a_prefill_chunk() -> None:
    """There is no workspace for more."""
    steps = list(compile_steps(replace(CONFIG, prefill_chunk_len=1_024, sparse_above=0)))
    assert max(step.slices[0].query_len for step in steps) == 1_024


def test_answers_are_those_without(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, num_hidden_layers=2)
    resolved = ResolvedEngine.resolve(EngineConfig(
        model=str(path), device="cpu", dtype="float32", block_size=16, prefill_chunk_len=1_024,
        max_model_len=3_000, memory_gib=2.0, attention="sparse"))
    answers = []
    for ahead in (False, True):
        runner = resolved.load_runner()
        if ahead:
            runner.compile_ahead(compile_steps(resolved.scheduler_config()))
        loop = Loop(Scheduler(resolved.scheduler_config()), LocalTransport(runner))
        request: Request = make_request(
            "a", [n % 200 for n in range(1_500)], max_tokens=6, sparse=True, ignore_eos=True)
        loop.add(request)
        kept = 0.0
        while not loop.is_idle:
            kept += loop.turn().kept_pairs
        answers.append((list(request.output_ids), kept))
        runner.close()
    assert answers[0] == answers[1] and answers[0][1] > 0
