"""`LLM` over two processes: answers of one, and an end within seconds where a rank stands still."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.attention.shared_decode import least_keys
from longspan.engine.front.llm import LLM
from longspan.engine.ranks import hub
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.errors import LongspanError, RankLostError
from tests.doubles import write_checkpoint

STALL_S = 3.0
DCA = {"chunk_size": 640, "local_size": 128, "original_max_position_embeddings": 512}
OPTIONS: dict[str, Any] = {
    "device": "cpu", "memory_gib": 0.8, "max_model_len": 2048, "block_size": 16,
    "prefill_chunk_len": 512, "max_num_requests": 8, "num_threads": 1, "attention": "sparse"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), dual_chunk_attention_config=DCA,
                            hidden_size=128, num_key_value_heads=4)


@pytest.fixture(scope="module")
def two(path: Path) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "STALL_S", STALL_S)
        with LLM(str(path), context_parallel=2, **OPTIONS) as llm:
            yield llm


def numbers(output: RequestOutput) -> Any:
    return output.token_ids, output.num_cached_tokens, output.finish_reason


def test_two_processes_answer_as_one(path: Path, two: LLM) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (3, 700, 1500)]
    assert least_keys(two._runner.caches[0]) < 2203, "decodes of all three share their keys"
    plain = SamplingParams(max_tokens=6, ignore_eos=True)
    params = [plain, replace(plain, temperature=1.0, seed=5),
              replace(plain, repetition_penalty=1.3, logprobs=2)]
    again = [*prompts[2], 7, 8]
    scored = SamplingParams(max_tokens=1, prompt_logprobs=1)
    with LLM(str(path), **OPTIONS) as one:
        wanted = [one.generate(prompts, params), one.generate([*prompts[1:], again]),
                  one.generate(prompts[1], scored)]
        density = one.stats().density
    found = [two.generate(prompts, params), two.generate([*prompts[1:], again]),
             two.generate(prompts[1], scored)]
    assert [list(map(numbers, part)) for part in found] == [
        list(map(numbers, part)) for part in wanted]
    assert found[1][2].num_cached_tokens > 1000
    assert two.stats().density == pytest.approx(density, rel=1e-3)
    one_scores, two_scores = wanted[2][0].prompt_logprobs, found[2][0].prompt_logprobs
    assert one_scores is not None and two_scores is not None
    assert two_scores[1:] == pytest.approx(one_scores[1:], abs=1e-4)


def test_what_cannot_be_shared_out_is_refused(path: Path) -> None:
    with pytest.raises(LongspanError, match="context_parallel must be positive, not 0"):
        LLM(str(path), context_parallel=0)
    with pytest.raises(LongspanError, match="ranks keep no KV in host memory"):
        LLM(str(path), context_parallel=2, kv_host_gib=1.0)


def test_a_rank_that_stands_still_ends_the_engine_within_seconds(two: LLM) -> None:
    (child,) = two._runner._hub._children.values()
    os.kill(child.pid, signal.SIGSTOP)
    begun_s = time.monotonic()
    with pytest.raises(RankLostError, match=r"rank 1 has not been heard of for 3 s"):
        two.generate([list(range(200)) * 7], SamplingParams(max_tokens=4))
    assert time.monotonic() - begun_s < STALL_S + 12
    assert child.wait(5) == -signal.SIGKILL
    with pytest.raises(RankLostError, match="rank 1 has not been heard of"):
        two.generate([[1, 2, 3]])
