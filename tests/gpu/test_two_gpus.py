"""Ranks on two GPUs: NCCL between processes. Answers are one GPU's, engines follow one another in a
process, a lost rank is named, and kernels are compiled ahead on all of them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.attention.sparsity import SparsityPlan
from longspan.config import ModelConfig
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from tests.engine.ranks.losing import generate_and_lose, serve_and_lose

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs")]
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "longspan" / "nano"  # of random weights a selection's near ties would show
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")[:20_000]
KINDS = ("context_parallel", "pipeline_parallel", "tensor_parallel")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Heads of unlike budgets, on every rank others; chunks that cannot be halved, since a
    pipeline would halve them; and no temperature, which comes from whose prompt a prefix was."""
    model = ModelConfig.from_dir(MODEL)
    every = SparsityPlan.default(model.num_layers, model.num_heads)
    heads = range(model.num_heads)
    plan = tmp_path_factory.mktemp("plan") / "plan.json"
    replace(every, vertical=(tuple(64 + 64 * head for head in heads),) * model.num_layers,
            slash=(tuple(1024 - 96 * head for head in heads),) * model.num_layers).save(plan)
    return {"device": "cuda", "dtype": "float32", "memory_gib": 8.0, "max_model_len": 16_384,
            "prefill_chunk_len": 2432, "max_num_requests": 4, "positions": "dca",
            "sparsity_plan": str(plan)}


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_engines_one_after_the_other_answer_as_one_gpu(
    options: dict[str, Any], attention: str,
) -> None:
    prompts = [TEXT, TEXT[:9_000] + "?", TEXT + TEXT[:1_300], "short"]
    options, found = {**options, "attention": attention}, dict[str, Any]()
    for kind in ("", *KINDS):
        with LLM(str(MODEL), **options, **{kind: 2} if kind else {}) as llm:
            params = SamplingParams(max_tokens=12, ignore_eos=True)
            found[kind] = [[one.token_ids for one in llm.generate(list(group), params)]
                           for group in (prompts, prompts[::-1])]  # then with cached prefixes
    assert {kind: tokens for kind, tokens in found.items() if tokens != found[""]} == {}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_answers_and_names_the_rank_that_is_lost(
    options: dict[str, Any], kind: str, how: signal.Signals,
) -> None:
    prompts = [TEXT, "short"]
    with LLM(str(MODEL), **options) as llm:
        wanted = llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    found, reason, seconds = asyncio.run(serve_and_lose(
        MODEL, prompts, how, **{kind: 2}, **options))
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert reason.startswith("rank 1 ")
    assert seconds < 15


@pytest.mark.parametrize("shared", ["--cp", "--pp", "--tp"])
def test_the_command_ends_with_a_line_where_a_rank_dies(
    tmp_path: Path, shared: str,
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("short")
    status, said, seconds = generate_and_lose(
        MODEL, prompt, shared, "2", "--device", "cuda", "--memory-gib", "8", "--max-model-len",
        "200000")
    assert status == 1 and said.splitlines()[-1] == "error: rank 1 was killed by SIGKILL"
    assert seconds < 15


def test_all_arrangements_are_measured_in_one_process(tmp_path: Path) -> None:
    """Which compiles ahead, with the released budgets of a real shape: heads differ in them."""
    done = subprocess.run(
        [sys.executable, "-m", "longspan.cli", "bench", "pipeline", "--shapes", "qwen2.5-7b",
         "--layers", "3", "--ranks", "1,cp2,pp2,tp2", "--lengths", "40000", "--chunk-lens", "16384",
         "--attention", "sparse,dense", "--decode", "5", "--users", "2", "--memory-gib", "30",
         "--device", "cuda", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("pipeline.*.json")
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * (3 * 2 + 3) + 4 and not any("error" in row for row in rows)
