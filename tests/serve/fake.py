"""A double of the engine, and a server around it on a free port."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import uvicorn

from longspan.engine.front.client import AsyncEngine, EngineStatus, GenerateRequest
from longspan.engine.request import (
    Event,
    FinishReason,
    Progress,
    PromptLogprobs,
    TokenEvent,
    TokenLogprob,
)
from longspan.errors import InvalidRequestError, LongspanError
from longspan.serve.app import create_app
from longspan.serve.config import ServeConfig

MODEL = "fake"
CHUNK_LEN = 64
ANSWER = "The quick brown fox jumps over the lazy dog. "


class DeadEngineError(LongspanError):
    """As the engine's."""

    http_status = 503


class FakeEngine:
    """What the server needs of `AsyncEngine`.

    One character is one token; the answer is `ANSWER` again and again. Prefill takes
    ``chunk_s`` for each `CHUNK_LEN` tokens, decode ``token_s`` for each token.
    """

    def __init__(self, **options: Any) -> None:
        self.chunk_s: float = options.pop("chunk_s", 0.0)
        self.token_s: float = options.pop("token_s", 0.0)
        self.tokenize_s: float = options.pop("tokenize_s", 0.0)
        self.load_s: float = options.pop("load_s", 0.0)
        self.answer: str = options.pop("answer", ANSWER)
        self.chats = list[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]()
        """Messages and template values that came."""
        self._status = EngineStatus(**{
            "state": "ready", "model": MODEL, "max_model_len": 4096, "capacity_tokens": 8192,
            **options})
        self.running = set[str]()
        self.requests = list[GenerateRequest]()
        self.aborted = list[str]()
        self.num_tokenizing = 0
        self.known = list[tuple[int, ...]]()
        self.is_closed = False

    def set(self, **changes: Any) -> None:
        """Change the status."""
        self._status = replace(self._status, **changes)

    async def start(self) -> None:
        """Load for ``load_s``, unless it fails."""
        if self._status.state == "loading" and self.load_s:
            asyncio.get_running_loop().call_later(self.load_s, lambda: self.set(state="ready"))

    def status(self) -> EngineStatus:
        """As set."""
        return self._status

    async def drain(self) -> None:
        """Wait."""
        while self.running:
            await asyncio.sleep(0.01)

    def cut_off(self) -> None:
        """Nothing is written here."""

    async def close(self) -> None:
        """Remember."""
        self.is_closed = True

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Code points."""
        self.num_tokenizing += 1
        try:
            await asyncio.sleep(self.tokenize_s)
        finally:
            self.num_tokenizing -= 1
        return [ord(char) for char in text]

    async def detokenize(self, token_ids: Sequence[int], *, with_special: bool = False) -> str:
        """Characters."""
        if any(token > 0x10FFFF or 0xD800 <= token < 0xE000 for token in token_ids):
            raise InvalidRequestError("there is no such token")
        return "".join(map(chr, token_ids))

    async def describe(
        self, token_ids: Sequence[int], found: PromptLogprobs
    ) -> Sequence[TokenLogprob]:
        """Each with itself as the only alternative, where any are wanted."""
        num_top = found.top_ids.shape[1]
        return [_logprob(chr(token), value, (_logprob(chr(token), value),) * min(num_top, 1))
                for token, value in zip(token_ids, found.logprobs.tolist(), strict=True)]

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], /, **values: Any
    ) -> Sequence[int]:
        """Roles in angle brackets."""
        self.chats.append((messages, values))
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return await self.tokenize(text + "<assistant>" * values["add_generation_prompt"])

    async def add(self, request: GenerateRequest) -> AsyncGenerator[Event]:
        """Accept."""
        if self._status.state == "dead":
            raise DeadEngineError("the engine is dead")
        self.requests.append(request)
        self.running.add(request.request_id)
        return self._run(request)

    async def _run(self, request: GenerateRequest) -> AsyncGenerator[Event]:
        name = request.request_id
        assert not isinstance(request.prompt, str), "the server tokenises"
        prompt = tuple(request.prompt)
        cached = self._find(prompt)
        is_done = False
        try:
            yield self._progress(request, 0, 0)
            done = cached
            if cached:
                yield self._progress(request, done, cached)
            while done < len(prompt):
                await asyncio.sleep(self.chunk_s)
                self._check_alive()
                done = min(len(prompt), done + CHUNK_LEN)
                yield self._progress(request, done, cached)
            self.known.append(prompt)
            async for event in self._decode(request, cached):
                is_done = event.finish_reason is not None
                yield event
        finally:
            self.running.discard(name)
            if not is_done:
                self.aborted.append(name)

    async def _decode(self, request: GenerateRequest, cached: int) -> AsyncIterator[TokenEvent]:
        params = request.params
        text = ""
        found = _prompt_logprobs(len(request.prompt), params.prompt_logprobs)
        if params.max_tokens == 0:
            yield TokenEvent(
                request_id=request.request_id, text="", token_ids=(), finish_reason="length",
                num_prompt_tokens=len(request.prompt), num_cached_tokens=cached,
                prompt_logprobs=found)
        for index in range(params.max_tokens):
            await asyncio.sleep(self.token_s)
            self._check_alive()
            char = self.answer[index % len(self.answer)]
            text += char
            is_stop = any(text.endswith(stop) for stop in params.stop)
            is_last = index + 1 == params.max_tokens
            # other answers than the usual one end where they end
            is_end = self.answer is not ANSWER and len(text) == len(self.answer)
            reason: FinishReason | None = (
                "stop" if is_stop or is_end else "length" if is_last else None)
            yield TokenEvent(
                request_id=request.request_id, text="" if is_stop else char,
                token_ids=(ord(char),), finish_reason=reason,
                num_prompt_tokens=len(request.prompt), num_cached_tokens=cached,
                logprobs=_logprobs(char, params.logprobs),
                prompt_logprobs=None if index else found)
            if reason:
                return

    def _check_alive(self) -> None:
        if self._status.state == "dead":
            raise DeadEngineError("the engine died")

    def _find(self, prompt: tuple[int, ...]) -> int:
        """Longest known prefix, in whole blocks of 16."""
        best = 0
        for other in self.known:
            same = 0
            for left, right in zip(prompt[:-1], other, strict=False):
                if left != right:
                    break
                same += 1
            best = max(best, same // 16 * 16)
        return best

    def _progress(self, request: GenerateRequest, done: int, cached: int) -> Progress:
        return Progress(
            request_id=request.request_id, num_prefilled_tokens=done,
            num_prompt_tokens=len(request.prompt), num_cached_tokens=cached, elapsed_s=0.0)


def _prompt_logprobs(length: int, count: int | None) -> PromptLogprobs | None:
    """-1, -2 and so on, behind the first token."""
    if count is None:
        return None
    values = np.array([math.nan, *range(-1, -length, -1)], np.float32)
    return PromptLogprobs(values, np.zeros((length, count), np.int32),
                          np.zeros((length, count), np.float32))


def _logprobs(char: str, count: int | None) -> tuple[TokenLogprob, ...]:
    if count is None:
        return ()
    top = tuple(_logprob(other, value) for other, value in
                ((char, -0.5), ("?", -1.5), ("!", -math.inf))[:count])
    return (_logprob(char, -0.5, top),)


def _logprob(char: str, value: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(
        token_id=ord(char), text=char, data=char.encode(), logprob=value, top=top)


@dataclass(slots=True)
class Running:
    """A server in a thread."""

    engine: FakeEngine
    port: int
    server: uvicorn.Server
    app: Any

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@contextmanager
def running(engine: FakeEngine | None = None, **options: Any) -> Iterator[Running]:
    """Serve on 127.0.0.1 until the block ends; every request must have ended by then."""
    engine = engine or FakeEngine()
    app = create_app(cast(AsyncEngine, engine), ServeConfig(**options))
    config = uvicorn.Config(
        app, port=0, log_config=None, http="h11", loop="asyncio", ws="none",
        timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started, "start")
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(engine, port, server, app)
        wait_for(lambda: not engine.running and not app.state.service.gate.num_open,
                 "requests to end")
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


def wait_for(condition: Any, what: str, timeout_s: float = 5.0) -> None:
    """Poll until it holds."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)
