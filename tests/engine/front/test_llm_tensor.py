"""`LLM` over processes that share heads and widths, some of them rows or layers too: the answers of
one."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.errors import LongspanError, RankLostError
from tests.doubles import EXPERTS, write_checkpoint

DCA = {"chunk_size": 640, "local_size": 128, "original_max_position_embeddings": 512}
OPTIONS: dict[str, Any] = {
    "device": "cpu", "memory_gib": 0.8, "max_model_len": 2048, "block_size": 16,
    "prefill_chunk_len": 512, "max_num_requests": 8, "num_threads": 1}
PLAIN = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model"), dual_chunk_attention_config=DCA, hidden_size=64,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False, **EXPERTS)


def answers(llm: LLM) -> list[Any]:
    """Three prompts together, two of them again with other ends, and one's log-probabilities."""
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (3, 700, 1500)]
    params = [PLAIN, replace(PLAIN, temperature=1.0, seed=5),
              replace(PLAIN, repetition_penalty=1.3, logprobs=2)]
    found = llm.generate(prompts, params)
    found += llm.generate([[*prompts[1], 9], [*prompts[2], 7, 8]], PLAIN)
    return [numbers(output) for output in found]


def numbers(output: RequestOutput) -> Any:
    return output.token_ids, output.num_cached_tokens, output.finish_reason


def scores(llm: LLM) -> list[Any]:
    """Log-probabilities of a prompt's tokens but the first."""
    prompt = [random.Random(4).randrange(256) for _ in range(300)]
    (found,) = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert found.prompt_logprobs is not None
    return list(found.prompt_logprobs[1:])


@pytest.mark.parametrize(("rows", "stages", "heads", "attention"), [
    (1, 1, 2, "dense"), (2, 1, 2, "sparse"), (1, 2, 2, "dense")])
def test_ranks_that_share_heads_answer_as_one(
    path: Path, rows: int, stages: int, heads: int, attention: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Then one of them is killed, which ends all within seconds, and all of them say by whom."""
    with LLM(str(path), attention=attention, **OPTIONS) as one:
        wanted, density, scored = answers(one), one.stats().density, scores(one)
    with LLM(str(path), attention=attention, context_parallel=rows, tensor_parallel=heads,
             pipeline_parallel=stages, **OPTIONS) as llm:
        assert answers(llm) == wanted
        assert wanted[-1][1] > 500
        assert llm.stats().density == pytest.approx(density, rel=1e-3)
        assert scores(llm) == pytest.approx(scored, abs=1e-4)
        last = rows * stages * heads - 1
        child = llm._runner._hub._children[last]
        os.kill(child.pid, signal.SIGKILL)
        words = f"rank {last} was killed by SIGKILL"
        with pytest.raises(RankLostError, match=words):
            llm.generate([list(range(200)) * 7], PLAIN)
        assert all(other.wait(5) is not None for other in llm._runner._hub._children.values())
    said = capfd.readouterr().err
    assert all(f"error: rank {rank}: {words}" in said for rank in range(1, last))


def test_what_cannot_be_shared_out_is_refused(path: Path) -> None:
    with pytest.raises(LongspanError, match="tensor_parallel must be positive, not 0"):
        LLM(str(path), tensor_parallel=0)
    with pytest.raises(LongspanError, match=(
            "tensor_parallel 3: the model has 4 KV heads, which 3 ranks cannot share equally; use "
            "tensor_parallel 2, or context_parallel")):
        LLM(str(path), tensor_parallel=3, **OPTIONS)  # before any rank is started
