"""A server over two ranks, and one that torchrun has started: answers of one rank, and named
ends."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from longspan.config import EngineConfig
from longspan.engine.front.client import AsyncEngine, GenerateRequest
from longspan.engine.front.llm import LLM
from longspan.engine.front.stream import Stream
from longspan.engine.request import RequestOutput, SamplingParams, TokenEvent
from tests.doubles import write_checkpoint

TIMEOUT_S = 90.0
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "memory_gib": 0.8, "max_model_len": 2048,
    "prefill_chunk_len": 512, "max_num_requests": 4, "num_threads": 1, "attention": "sparse"}
TEXT = "".join(chr(random.Random(1).randrange(97, 122) + index % 2) for index in range(1500))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


async def last(stream: Stream) -> RequestOutput:
    async for event in stream:
        if isinstance(event, TokenEvent) and event.output is not None:
            return event.output
    raise AssertionError("the stream ended early")


async def serve_and_kill(path: Path, prompts: list[str]) -> tuple[list[RequestOutput], str, float]:
    """Answer with two ranks, then kill the second one in the middle of a prompt."""
    engine = AsyncEngine(EngineConfig(model=str(path), context_parallel=2, **OPTIONS))
    await engine.start()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while engine.status().state == "loading":
                await asyncio.sleep(0.02)
            assert engine.status().state == "ready", engine.status().reason
            params = SamplingParams(max_tokens=5, ignore_eos=True)
            streams = [await engine.add(GenerateRequest(
                request_id="r", prompt=prompt, params=params)) for prompt in prompts]
            found = list(await asyncio.gather(*map(last, streams)))
            await engine.add(GenerateRequest(
                request_id="r", prompt=TEXT[::-1], params=SamplingParams(max_tokens=400)))
            await asyncio.sleep(0.2)
            (rank,) = [child for child in psutil.Process().children(recursive=True)
                       if "longspan-rank-1" in child.cmdline()]
            rank.kill()
            begun_s = time.monotonic()
            while engine.status().state != "dead":
                await asyncio.sleep(0.02)
            return found, engine.status().reason, time.monotonic() - begun_s
    finally:
        await engine.close()


def test_a_server_over_two_ranks_answers_as_one_and_names_the_rank_that_dies(path: Path) -> None:
    prompts = [TEXT, TEXT[:900] + "?", "short"]
    with LLM(str(path), **OPTIONS) as llm:
        wanted = llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    found, reason, seconds = asyncio.run(serve_and_kill(path, prompts))
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert reason == "rank 1 was killed by SIGKILL"
    assert seconds < 8
    assert not [child for child in psutil.Process().children(recursive=True)
                if "longspan-rank-1" in child.cmdline()]


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
