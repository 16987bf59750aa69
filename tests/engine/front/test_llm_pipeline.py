"""`LLM` over two and four processes that share the layers: the answers of one process."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.errors import LongspanError, RankLostError
from tests.doubles import write_checkpoint

DCA = {"chunk_size": 640, "local_size": 128, "original_max_position_embeddings": 512,
       "sparse_attention_threshold": 1024}
OPTIONS: dict[str, Any] = {
    "device": "cpu", "memory_gib": 0.8, "max_model_len": 2048, "block_size": 16,
    "prefill_chunk_len": 512, "max_num_requests": 8, "num_threads": 1}
PLAIN = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=5,
                            dual_chunk_attention_config=DCA)


def answers(llm: LLM) -> list[Any]:
    """Three prompts together, then two of them again with other ends: of the prefix cache."""
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (3, 700, 1500)]
    params = [PLAIN, replace(PLAIN, temperature=1.0, seed=5),
              replace(PLAIN, repetition_penalty=1.3, logprobs=2)]
    found = llm.generate(prompts, params)
    found += llm.generate([[*prompts[1], 9], [*prompts[2], 7, 8]], PLAIN)
    return [numbers(output) for output in found]


def numbers(output: RequestOutput) -> Any:
    return output.token_ids, output.num_cached_tokens, output.finish_reason


@pytest.mark.parametrize(("rows", "count", "attention"), [
    (1, 2, "sparse"), (1, 4, "dense"), (2, 2, "auto")])
def test_stages_in_processes_answer_as_one(
    path: Path, rows: int, count: int, attention: str,
) -> None:
    """Then the last one is killed, which ends all within seconds. ``auto``: the longest prompts
    are sparse, the others dense."""
    with LLM(str(path), attention=attention, **OPTIONS) as one:
        # a pipeline's ladder cuts sparse prompts elsewhere
        config = replace(one._loop._scheduler.config, num_stages=count)
        one._loop = Loop(Scheduler(config), one._runner.transport())
        wanted, density = answers(one), one.stats().density
        assert 700 < one._intake.sparse_threshold < 1500
    with LLM(str(path), attention=attention, pipeline_parallel=count,
             context_parallel=rows, **OPTIONS) as llm:
        assert answers(llm) == wanted
        assert wanted[-1][1] > 500
        assert llm.stats().density == pytest.approx(density, rel=1e-3)
        child = list(llm._runner._hub._children.values())[-1]
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RankLostError, match=rf"rank {rows * count - 1} was killed by SIGKILL"):
            llm.generate([list(range(200)) * 7], PLAIN)


def test_what_cannot_be_shared_out_is_refused(path: Path) -> None:
    with pytest.raises(LongspanError, match="pipeline_parallel must be positive, not 0"):
        LLM(str(path), pipeline_parallel=0)
    with pytest.raises(LongspanError, match="2 ranks keep no KV in host memory"):
        LLM(str(path), pipeline_parallel=2, kv_host_gib=1.0)
