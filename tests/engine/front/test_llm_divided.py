"""`LLM` over two processes with memory for less than the context that is asked for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.errors import NotEnoughMemoryError
from longspan.units import GIB
from tests.doubles import write_checkpoint
from tests.engine.front.test_llm_ranks import DCA, OPTIONS, numbers


def test_a_context_that_no_rank_could_hold_alone(tmp_path: Path) -> None:
    """The ranks divide their caches by themselves, and answer as one that has the memory it needs:
    several prompts together, prefixes, log-probabilities."""
    path = write_checkpoint(tmp_path, dual_chunk_attention_config=DCA, num_hidden_layers=12)
    rng = random.Random(5)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (5, 700, 1500)]
    params, scored = SamplingParams(max_tokens=6, ignore_eos=True), SamplingParams(
        max_tokens=1, prompt_logprobs=1)

    def answers(llm: LLM) -> list[RequestOutput]:
        return [*llm.generate(prompts, params), *llm.generate([[*prompts[2], 7]], params),
                *llm.generate([prompts[1]], scored)]

    with LLM(str(path), **OPTIONS) as one:
        wanted, memory = answers(one), one.memory
    little = {**OPTIONS, "memory_gib": (memory.needed_bytes - 0.2 * memory.context_bytes) / GIB}
    with pytest.raises(NotEnoughMemoryError):
        LLM(str(path), **little)
    with LLM(str(path), context_parallel=2, **little) as two:
        found, own = answers(two), two.memory
        parts = two._runner.caches[0].k.shape[1]
    assert own.max_model_len == memory.max_model_len and parts == 8
    assert own.kv_bytes_per_token <= memory.kv_bytes_per_token / 2
    assert list(map(numbers, found)) == list(map(numbers, wanted))
    assert wanted[3].num_cached_tokens > 1000
    scores = [output.prompt_logprobs for output in (found[-1], wanted[-1])]
    assert scores[0] is not None and scores[1] is not None
    assert scores[0][1:] == pytest.approx(scores[1][1:], abs=1e-4)


def test_ranks_end_in_silence_where_no_plan_fits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    """Rank 0 says what is missing, and nobody says anything else."""
    path = write_checkpoint(tmp_path, dual_chunk_attention_config=DCA)
    with pytest.raises(NotEnoughMemoryError, match="needs"):
        LLM(str(path), context_parallel=2, **{**OPTIONS, "memory_gib": 1e-3})
    assert not capfd.readouterr().err
