"""From a request's bytes to its answer: what all routes that compute have in common."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from longspan.engine.front.client import AsyncEngine
from longspan.engine.request import SamplingParams, TokenEvent
from longspan.serve.admission import Gate
from longspan.serve.body import (
    Disconnect,
    announced_bytes,
    cancel,
    check_media_type,
    parse_aside,
    read_body,
)
from longspan.serve.config import ServeConfig
from longspan.serve.errors import ApiError, ClientGone
from longspan.serve.format import ChatFormat, CompletionFormat, Delta, Format
from longspan.serve.generation import Generation, Job, millis
from longspan.serve.metrics import Metrics
from longspan.serve.prompts import GenerateBody, Prompts
from longspan.serve.protocol import CompletionRequest
from longspan.serve.sampling import (
    asked_max_tokens,
    check_scoring,
    check_streaming,
    sampling_params,
)
from longspan.serve.stream import EventStreamResponse, EventWriter, StreamOptions
from longspan.serve.tools import offered_tools

Model = TypeVar("Model", bound=BaseModel)


class Service:
    """One server: an engine, its gate and its counters."""

    def __init__(self, engine: AsyncEngine, config: ServeConfig) -> None:
        self.engine, self.config = engine, config
        self.gate = Gate(config, engine.status)
        self.metrics = Metrics(self.gate, engine.status)
        self.prompts = Prompts(engine)

    @property
    def model_name(self) -> str:
        """Name under which the model is served."""
        return self.config.model_name or self.engine.status().model

    # -- completions ---------------------------------------------------------------------------

    async def generate(self, request: Request, kind: type[GenerateBody]) -> Response:
        """Answer a POST of a completion, streaming or not."""
        async with AsyncExitStack() as stack:
            stack.push(self._count_gone)
            return await self._generate(request, kind, stack)

    async def _generate(
        self, request: Request, kind: type[GenerateBody], stack: AsyncExitStack
    ) -> Response:
        num_bytes = self._check_head(request)
        ticket = stack.enter_context(self.gate.enter(num_bytes))
        buffer = stack.enter_context(ExitStack())
        body = await self._read(request, kind, buffer)
        params = self._check(body)
        watcher = Disconnect(request.receive)
        stack.push_async_callback(watcher.close)
        generation = Generation(self.engine, self.gate, ticket)
        stack.callback(lambda: self.metrics.finished(generation.usage))
        stack.push_async_callback(generation.close)
        prepared = asyncio.create_task(self._prepare(
            request.state.request_id, body, params, generation, buffer))
        stack.push_async_callback(cancel, prepared)
        format = self._format(request.state.request_id, body)
        if body.stream:
            options = self._stream_options(request.state.request_id, body)
            writer = EventWriter(generation, format, options, self.gate, ticket)
            return await self._stream(prepared, generation, writer, watcher, stack)
        await watcher.race(_wait(prepared))
        deltas = await watcher.race(_collect(generation))
        # aside, for a prompt's log-probabilities may be a million
        return await asyncio.to_thread(
            lambda: JSONResponse(format.reply(deltas, generation.usage)))

    def _count_gone(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object,
    ) -> bool:
        if kind is ClientGone:
            self.metrics.gone()
        return False

    async def _stream(
        self, prepared: asyncio.Task[None], generation: Generation, writer: EventWriter,
        watcher: Disconnect, stack: AsyncExitStack,
    ) -> Response:
        headers = dict[str, str]()
        if await watcher.race_for(prepared, self.config.header_grace_s):
            prepared.result()  # until this time a refusal still gets its own status
            expected_ms = millis(generation.usage.predicted_ttft_s)
            if expected_ms is not None:
                headers["X-Predicted-TTFT-Ms"] = str(expected_ms)
        return EventStreamResponse(
            writer.pieces(prepared), watcher, stack.pop_all(), self.config.send_timeout_s, headers)

    def _stream_options(self, request_id: str, body: GenerateBody) -> StreamOptions:
        wanted = body.stream_options
        return StreamOptions(
            request_id=request_id,
            include_usage=bool(wanted and wanted.include_usage),
            continuous_usage=bool(wanted and wanted.continuous_usage_stats),
            return_progress=bool(body.return_progress),
            ping_interval_s=self.config.ping_interval_s)

    async def _prepare(
        self, request_id: str, body: GenerateBody, params: SamplingParams, generation: Generation,
        buffer: ExitStack,
    ) -> None:
        """Tokenise, check lengths, hand over to the engine."""
        with buffer:
            prompts = await self.prompts.of(body)
            asked = asked_max_tokens(body)
            each = [self.prompts.fit(params, len(prompt), asked) for prompt in prompts]
            await generation.start(Job(
                request_id=request_id, prompts=prompts, params=each, n=body.n or 1,
                echoes=await self.prompts.echoes(body)))

    def _check(self, body: GenerateBody) -> SamplingParams:
        """Refuse everything that can be refused before tokenising."""
        self.check_model(body.model)
        check_streaming(body)
        num_prompts = 1
        if isinstance(body, CompletionRequest):
            num_prompts = len(body.prompt)
            check_scoring(body)
        if num_prompts * (body.n or 1) > self.config.max_choices:
            raise ApiError(400, f"{num_prompts * (body.n or 1)} completions in one request; at "
                           f"most {self.config.max_choices}.", param="n")
        return sampling_params(
            body, self.engine.status().default_sampling, self.config.default_max_tokens,
            self.engine.status().call_format)

    def _format(self, request_id: str, body: GenerateBody) -> Format:
        with_logprobs = body.logprobs is not None and body.logprobs is not False
        if isinstance(body, CompletionRequest):
            return CompletionFormat(request_id, self.model_name, with_logprobs=with_logprobs)
        names = [tool.function.name for tool in offered_tools(body)]
        return ChatFormat(
            request_id, self.model_name, with_logprobs=with_logprobs, tool_names=names,
            call_format=self.engine.status().call_format if names else None)

    # -- shared with the smaller routes --------------------------------------------------------

    @asynccontextmanager
    async def small_request(
        self, request: Request, kind: type[Model]
    ) -> AsyncIterator[tuple[Model, Disconnect]]:
        """Return the checked body of a route that only converts, and a watch on its sender."""
        self.gate.check_open()
        self._check_head(request)
        with ExitStack() as buffer:
            body = await self._read(request, kind, buffer)
            self.check_model(getattr(body, "model", None))
            watcher = Disconnect(request.receive)
            try:
                yield body, watcher
            finally:
                await watcher.close()

    def check_model(self, name: str | None) -> None:
        """Raise 404 for another model's name."""
        if name is not None and name != self.model_name:
            raise ApiError(404, f"The model {name[:100]!r} is not served here; this is "
                           f"{self.model_name!r}.", code="model_not_found", param="model")

    def _check_head(self, request: Request) -> int:
        check_media_type(request)
        num_bytes = announced_bytes(request)
        self.gate.check_body(num_bytes)
        return num_bytes

    async def _read(self, request: Request, kind: type[Model], buffer: ExitStack) -> Model:
        take = buffer.enter_context(self.gate.buffer())
        return await parse_aside(
            kind, await read_body(request, take, self.config.body_timeout_s))


async def _wait(task: asyncio.Task[None]) -> None:
    await task


async def _collect(generation: Generation) -> list[Delta]:
    """Return every completion in full, in order."""
    deltas = dict[int, Delta]()
    while not generation.is_finished:
        for index, event in await generation.next_events():
            if isinstance(event, TokenEvent):
                deltas.setdefault(index, Delta(index)).add(event)
    return [deltas[index] for index in sorted(deltas)]
