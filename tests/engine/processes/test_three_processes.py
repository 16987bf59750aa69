"""The bundled model in three processes answers as `LLM` does in one, from disk too."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from longspan.config import EngineConfig
from longspan.engine.front.client import GenerateRequest
from longspan.engine.front.llm import LLM
from longspan.engine.request import Progress, RequestOutput, SamplingParams
from tests.engine.processes.serving import last, serving

TIMEOUT_S = 60.0
OPTIONS: dict[str, Any] = {
    "device": "cpu", "num_threads": 1, "max_model_len": 2048, "prefill_chunk_len": 256,
    "max_num_requests": 8}
TEXTS = [
    "Once upon a time", "The capital of France is", "1 2 3 4 5 6", "def main():", "x" * 200,
    "In the year 1969 " * 40,
    "<|im_start|>user\nIs there a code?\nAnswer with the number only.<|im_end|>\n"
    "<|im_start|>assistant\n"]  # nano's answer ends by itself
CASES = [
    *((text, SamplingParams(max_tokens=12)) for text in TEXTS),
    (TEXTS[0], SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=5)),
    (TEXTS[1], SamplingParams(max_tokens=12, repetition_penalty=1.3, frequency_penalty=0.5)),
    (TEXTS[2], SamplingParams(max_tokens=12, logprobs=2, stop=(" 6 6",))),
    (TEXTS[0], SamplingParams(max_tokens=20, json_schema='{"type": "integer"}'))]


async def answers() -> list[RequestOutput]:
    config = EngineConfig(model="nano", **OPTIONS)
    async with serving(config, TIMEOUT_S) as engine:
        streams = [await engine.add(GenerateRequest(
            request_id="r", prompt=prompt, params=params)) for prompt, params in CASES]
        found = await asyncio.gather(*map(last, streams))
        while engine.status().num_used_tokens:
            await asyncio.sleep(0.01)
        return found


def test_same_answers_in_one_process_and_in_three() -> None:
    """`LLM` waits for each token before the next step; the processes run ahead."""
    with LLM("nano", **OPTIONS) as llm:
        wanted = [llm.generate(prompt, params)[0] for prompt, params in CASES]
    assert {output.finish_reason for output in wanted} == {"stop", "length"}
    for one, other in zip(asyncio.run(answers()), wanted, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == \
            (other.token_ids, other.text, other.finish_reason)
        assert len(one.logprobs) == len(other.logprobs)
        assert one.ttft_s is not None and one.prefill_s is not None
        assert 0 < one.prefill_s <= one.ttft_s


async def ask_and_keep(
    prompt: list[int], folder: Path, cut_at: int | None = None,
) -> RequestOutput | int:
    """Ask an engine that keeps its KV blocks, and end it as a server does.

    Args:
        cut_at: prefilled tokens after which the request is cut off.

    Returns the answer, or how many tokens were prefilled when it was cut off.
    """
    config = EngineConfig(
        model="nano", kv_dir=str(folder), **{**OPTIONS, "max_model_len": 4096})
    async with serving(config, TIMEOUT_S) as engine:
        assert engine.status().keeps_on_disk
        assert engine.status().memory_bytes["KV on disk, at most"] > 0
        stream = await engine.add(GenerateRequest(
            request_id="r", prompt=prompt, params=SamplingParams(max_tokens=8)))
        found: RequestOutput | int = 0
        if cut_at is None:
            found = await last(stream)
        else:
            async for event in stream:
                assert isinstance(event, Progress), "cut_at is too late"
                if event.num_prefilled_tokens >= cut_at:
                    found = event.num_prefilled_tokens
                    break
        engine.cut_off()
        while engine.status().num_running or engine.status().num_unwritten_tokens:
            await asyncio.sleep(0.02)
        return found


def test_a_new_engine_reads_what_another_one_wrote_to_its_end(tmp_path: Path) -> None:
    prompt = [number % 4000 for number in range(0, 2_300 * 7, 7)]
    first, second = (asyncio.run(ask_and_keep(prompt, tmp_path)) for _ in range(2))
    assert isinstance(first, RequestOutput) and isinstance(second, RequestOutput)
    assert first.token_ids == second.token_ids
    assert first.num_cached_tokens == 0 and first.prefix_origin is None
    assert second.num_cached_tokens == 2_300 // 128 * 128
    assert second.prefix_origin is not None and second.prefix_origin.load_s > 0
    assert second.prefix_origin.num_disk_tokens == second.num_cached_tokens


def test_a_prefill_that_a_servers_end_cuts_off_goes_on_in_the_next_one(tmp_path: Path) -> None:
    prompt = [number % 4000 for number in range(0, 3_900 * 7, 7)]
    num_done = asyncio.run(ask_and_keep(prompt, tmp_path, cut_at=2_304))
    again = asyncio.run(ask_and_keep(prompt, tmp_path))
    assert isinstance(num_done, int) and isinstance(again, RequestOutput)
    assert again.num_cached_tokens >= num_done // 128 * 128 > 2_048
