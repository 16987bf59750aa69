"""A server over two ranks, and one that torchrun has started: answers of one rank, and named
ends."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from tests.doubles import write_checkpoint
from tests.engine.ranks.losing import (
    OPTIONS,
    TEXT,
    TIMEOUT_S,
    generate_and_lose,
    other_ranks,
    serve_and_lose,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def test_a_server_over_two_ranks_answers_as_one_and_names_the_rank_that_dies(path: Path) -> None:
    prompts = [TEXT, TEXT[:900] + "?", "short"]
    with LLM(str(path), **OPTIONS) as llm:
        wanted = llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    found, reason, seconds = asyncio.run(serve_and_lose(
        path, prompts, context_parallel=2, **OPTIONS))
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert reason == "rank 1 was killed by SIGKILL"
    assert seconds < 8
    assert not other_ranks(psutil.Process())


def test_the_command_ends_with_a_line_where_a_rank_dies(path: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("short")
    status, said, seconds = generate_and_lose(
        path, prompt, "--pp", "2", "--device", "cpu", "--threads", "1", "--memory-gib", "0.8",
        "--max-model-len", "200000")
    assert status == 1 and said.splitlines()[-1] == "error: rank 1 was killed by SIGKILL"
    assert seconds < 8


def torchrun(path: Path, prompt: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "longspan.cli", "generate", str(path), "--prompt-file", str(prompt), "--raw",
         "--json", "--max-tokens", "4", "--threads", "1", "--memory-gib", "0.8", *arguments],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_processes_of_torchrun_join(path: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT)
    sizes = ("--max-model-len", "2048", "--prefill-chunk-len", "512")
    done = torchrun(path, prompt, *sizes)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()  # of rank 0 alone
    with LLM(str(path), num_threads=1, memory_gib=0.8, max_model_len=2048,
             prefill_chunk_len=512) as llm:
        (wanted,) = llm.generate(TEXT, SamplingParams(max_tokens=4))
    assert tuple(json.loads(line)["token_ids"]) == wanted.token_ids
    refused = torchrun(path, prompt, "--cp", "3")
    assert refused.returncode != 0
    assert "error: --cp 3, and torchrun has started 2 processes" in refused.stderr
