"""Ranks that are lost while they answer: a server's, and the command's."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from longspan.config import EngineConfig
from longspan.engine.front.client import GenerateRequest
from longspan.engine.request import RequestOutput, SamplingParams
from tests.engine.processes.serving import last, serving

TIMEOUT_S = 90.0
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "memory_gib": 0.8, "max_model_len": 2048,
    "prefill_chunk_len": 512, "max_num_requests": 4, "num_threads": 1, "attention": "sparse"}
TEXT = "".join(chr(random.Random(1).randrange(97, 122) + index % 2) for index in range(1500))


def other_ranks(process: psutil.Process) -> list[psutil.Process]:
    """List the first other rank of an engine, once it is there."""
    return [child for child in process.children(recursive=True)
            if "longspan-rank-1" in child.cmdline()]


async def serve_and_lose(
    path: Path, prompts: Sequence[str], how: signal.Signals = signal.SIGKILL, **options: Any,
) -> tuple[list[RequestOutput], str, float]:
    """Answer with several ranks, then lose the second one in the middle of a prompt. Returns
    answers, what the server says, and after how many seconds."""
    config = EngineConfig(model=str(path), **options)
    async with serving(config, TIMEOUT_S) as engine:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        streams = [await engine.add(GenerateRequest(
            request_id="r", prompt=prompt, params=params)) for prompt in prompts]
        found = list(await asyncio.gather(*map(last, streams)))
        await engine.add(GenerateRequest(
            request_id="r", prompt=prompts[0][::-1], params=SamplingParams(max_tokens=400)))
        await asyncio.sleep(0.2)
        (rank,) = other_ranks(psutil.Process())
        rank.send_signal(how)
        begun_s = time.monotonic()
        while engine.status().state != "dead":
            await asyncio.sleep(0.02)
        return found, engine.status().reason, time.monotonic() - begun_s


def generate_and_lose(path: Path, prompt: Path, *arguments: str) -> tuple[int, str, float]:
    """Have the command answer at length, and kill its second rank while it does. Returns its
    status, what it says, and how long after that it ended, seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "longspan.cli", "generate", str(path), "--prompt-file", str(prompt),
         "--raw", "--max-tokens", "100000", *arguments], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.read(1)  # it answers
        (rank,) = other_ranks(psutil.Process(process.pid))
        rank.kill()
        begun_s = time.monotonic()
        _, said = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, said, time.monotonic() - begun_s
    finally:
        process.kill()
