"""Decode throughput of the asynchronous engine, with steps run ahead and without.

Both run the same processes and the same loop; the synchronous baseline lets one step be in flight
instead of two or more, so that each step waits until the last one's tokens are back. The Qwen2.5-1M
report (arXiv 2501.15383, section 5.3) calls what removes this wait the Totally Asynchronous
Generator.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import replace

from longspan.bench.ops.inputs import BLOCK_SIZE
from longspan.config import EngineConfig
from longspan.engine.front.client import AsyncEngine, GenerateRequest
from longspan.engine.processes.backend import Backend, Send, Start
from longspan.engine.processes.launch import MAX_IN_FLIGHT, in_processes
from longspan.engine.processes.wire import FromEngine, Stepped
from longspan.engine.request import SamplingParams, TokenEvent
from longspan.errors import LongspanError

PROMPT_LEN = 64
NUM_TOKENS = 256
"""Completion of each request."""
WARM_TOKENS = 16
MODES = {"tag": MAX_IN_FLIGHT, "synchronous": 1}
POLL_S = 0.05

Figure = tuple[str, float, str]
"""Metric, value, unit."""


def measure_decode(
    model: EngineConfig, batches: Sequence[int], *, num_tokens: int = NUM_TOKENS,
) -> list[Figure]:
    """Measure tokens a second and the device's idle share between steps, for each batch size and
    mode. ``model``: with sizes left open."""
    config = replace(
        model, max_num_requests=max(batches),
        # on CPUs the KV pool holds a few requests of full length: here the whole batch, in blocks
        max_model_len=max(batches) * (PROMPT_LEN + num_tokens + BLOCK_SIZE))
    rates = dict[tuple[str, int], float]()
    figures = list[Figure]()
    for mode, in_flight in MODES.items():
        for batch, rate, idle in asyncio.run(_measure(config, in_flight, batches, num_tokens)):
            rates[mode, batch] = rate
            figures += [(f"{mode}_tokens_per_s_batch_{batch}", rate, "tokens/s"),
                        (f"{mode}_idle_share_batch_{batch}", 100 * idle, "%")]
    return figures + [
        (f"tag_over_synchronous_batch_{batch}", rates["tag", batch] / rates["synchronous", batch],
         "x") for batch in batches]


async def _measure(
    config: EngineConfig, in_flight: int, batches: Sequence[int], num_tokens: int,
) -> list[tuple[int, float, float]]:
    """Return (batch size, tokens/s, idle share) for each batch size, on one engine."""
    steps = list[Stepped]()
    engine = AsyncEngine(config, listening(in_processes(max_in_flight=in_flight), steps))
    await engine.start()
    try:
        while engine.status().state == "loading":
            await asyncio.sleep(POLL_S)
        if engine.status().state != "ready":
            raise LongspanError(f"the engine did not start: {engine.status().reason}")
        found = []
        for batch in batches:
            await _decode(engine, batch, WARM_TOKENS)
            steps.clear()
            await _decode(engine, batch, num_tokens)
            found.append((batch, *rate_and_idle(steps, batch)))
        return found
    finally:
        await engine.close()


def listening(start: Start, steps: list[Stepped]) -> Start:
    """Wrap ``start``: the same engine, whose step reports are kept in ``steps`` besides."""
    def begin(config: EngineConfig, send: Send) -> Backend:
        def hear(message: FromEngine) -> None:
            if isinstance(message, Stepped):
                steps.append(message)
            send(message)

        return start(config, hear)

    return begin


def rate_and_idle(steps: Sequence[Stepped], batch: int) -> tuple[float, float]:
    """Return tokens a second, and the share of the time that the device had no step, over the steps
    in which all requests of the batch decode."""
    full = [step for step in steps
            if len(step.slices) == batch and all(item.samples and item.computed_len > PROMPT_LEN
                                                 for item in step.slices)]
    if len(full) < 3:
        raise LongspanError("too few steps decoded the whole batch; ask for more tokens")
    # From the end of the first one: its own beginning may have waited for a prefill.
    elapsed_s = full[-1].finished_s - full[0].finished_s
    busy_s = sum(step.result.elapsed_s for step in full[1:])
    num_steps = sum(step.result.repeats for step in full[1:])
    return batch * num_steps / elapsed_s, max(0.0, 1 - busy_s / elapsed_s)


async def _decode(engine: AsyncEngine, batch: int, num_tokens: int) -> None:
    async def one(index: int) -> None:
        stream = await engine.add(GenerateRequest(
            request_id=str(index), prompt=array("i", [10 + index] * PROMPT_LEN),
            params=SamplingParams(max_tokens=num_tokens, ignore_eos=True)))
        async for event in stream:
            if isinstance(event, TokenEvent) and event.finish_reason == "abort":
                raise LongspanError("the engine cancelled a request of the benchmark")

    await asyncio.gather(*(one(index) for index in range(batch)))
