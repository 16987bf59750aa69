"""An engine in its processes, and whole answers of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from longspan.config import EngineConfig
from longspan.engine.front.client import AsyncEngine
from longspan.engine.front.stream import Stream
from longspan.engine.request import RequestOutput, TokenEvent


@asynccontextmanager
async def serving(config: EngineConfig, timeout_s: float) -> AsyncIterator[AsyncEngine]:
    """Start an engine and wait until it is ready; it is closed at the end, which must come in
    time."""
    engine = AsyncEngine(config)
    await engine.start()
    try:
        async with asyncio.timeout(timeout_s):
            while engine.status().state == "loading":
                await asyncio.sleep(0.02)
            assert engine.status().state == "ready", engine.status().reason
            yield engine
    finally:
        await engine.close()


async def last(stream: Stream) -> RequestOutput:
    """The whole result; the events before must add up to it."""
    text, token_ids = "", list[int]()
    async for event in stream:
        if isinstance(event, TokenEvent):
            text += event.text
            token_ids += event.token_ids
            if event.output is not None:
                assert (text, tuple(token_ids)) == (event.output.text, event.output.token_ids)
                return event.output
    raise AssertionError("the stream ended early")
