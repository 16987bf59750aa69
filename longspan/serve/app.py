"""The application: routes and their OpenAPI schema."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from longspan.documents.gather import Document
from longspan.documents.sources import Source, SourceIndex
from longspan.engine.front.client import AsyncEngine
from longspan.errors import LongspanError
from longspan.serve import replies
from longspan.serve.auth import EdgeMiddleware
from longspan.serve.body import cancel
from longspan.serve.config import ServeConfig
from longspan.serve.errors import ApiError, ClientGone, error_response
from longspan.serve.generation import millis
from longspan.serve.page_routes import page_routes
from longspan.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SourcesRequest,
    TokenizeRequest,
)
from longspan.serve.service import Service

REF = "#/components/schemas/{model}"
BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, SourcesRequest)
REFUSALS = {400: "The request is wrong; the message names the field.",
            401: "The API key is missing or wrong.",
            403: "The Host, or the page that asks, is not of this server.", 404: "No such model.",
            408: "The request did not arrive in time.", 413: "The body is too long.",
            415: "The body is not JSON.", 429: "The queue is full; see Retry-After.",
            431: "Too many headers.", 503: "Loading, shutting down or dead."}
IDS_PER_PIECE = 16_384


def create_app(engine: AsyncEngine, config: ServeConfig) -> FastAPI:
    """Build an ASGI application in front of an engine, which the caller starts and closes."""
    service = Service(engine, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        lag = asyncio.create_task(service.metrics.watch_loop())
        try:
            yield
        finally:
            await cancel(lag)

    app = FastAPI(title="longspan", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.include_router(_completions(service))
    app.include_router(_tokens(service))
    app.include_router(_operations(service))
    app.include_router(page_routes(_errors((401, 403, 431))))
    app.add_middleware(EdgeMiddleware, config=config, answered=service.metrics.answered)
    for kind in (ApiError, ClientGone, HTTPException, LongspanError):
        app.add_exception_handler(kind, error_response)
    app.openapi = partial(_openapi, app, bool(config.api_keys))  # type: ignore[method-assign]
    return app


def _completions(service: Service) -> APIRouter:
    router = APIRouter(tags=["completions"])

    @router.post("/v1/chat/completions", **_docs(ChatRequest, replies.ChatReply, True))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await service.generate(request, ChatRequest)

    @router.post("/v1/completions", **_docs(CompletionRequest, replies.CompletionReply, True))
    async def complete(request: Request) -> Response:
        """Continue a text."""
        return await service.generate(request, CompletionRequest)

    return router


def _tokens(service: Service) -> APIRouter:
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", **_docs(TokenizeRequest, replies.TokenizeReply))
    async def tokenize(request: Request) -> Response:
        """Count and list the tokens of a text or of a conversation."""
        async with service.small_request(request, TokenizeRequest) as (body, watcher):
            ids = await watcher.race(_tokenize(service, body))
        head = {"count": len(ids), "max_model_len": service.engine.status().max_model_len,
                "predicted_ttft_ms": millis(service.gate.predict_new_s(len(ids)))}
        if not body.return_tokens:
            return JSONResponse(head)
        return StreamingResponse(_spread(head, ids), media_type="application/json")

    @router.post("/sources", **_docs(SourcesRequest, replies.SourcesReply))
    async def sources(request: Request) -> Response:
        """Find where in documents an answer's words stand."""
        async with service.small_request(request, SourcesRequest) as (body, watcher):
            found = await watcher.race(asyncio.to_thread(_find_sources, body))
        return JSONResponse({"sources": [asdict(one) for one in found]})

    @router.post("/detokenize", **_docs(DetokenizeRequest, replies.DetokenizeReply))
    async def detokenize(request: Request) -> Response:
        """Return the text of token ids."""
        async with service.small_request(request, DetokenizeRequest) as (body, watcher):
            text = await watcher.race(_detokenize(service, body.tokens))
        return JSONResponse({"prompt": text})

    return router


def _operations(service: Service) -> APIRouter:
    router = APIRouter(tags=["operations"])
    created = int(time.time())

    def card() -> dict[str, Any]:
        status = service.engine.status()
        return {"id": service.model_name, "object": "model", "created": created,
                "owned_by": "longspan", "max_model_len": status.max_model_len,
                "capacity_tokens": status.capacity_tokens}

    @router.get("/v1/models", responses=_responses(replies.ModelList, (401, 403, 431)))
    async def models() -> Response:
        """List the served model."""
        return JSONResponse({"object": "list", "data": [card()]})

    @router.get("/v1/models/{name:path}",
                responses=_responses(replies.ModelCard, (401, 403, 404, 431)))
    async def model(name: str) -> Response:
        """Describe the served model."""
        service.check_model(name)
        return JSONResponse(card())

    @router.get("/health", responses={
        **_responses(replies.HealthReply, (403, 431)), 503: {"model": replies.HealthReply}})
    async def health() -> Response:
        """Tell whether requests are served: 200 when ready, 503 otherwise. Needs no API key."""
        state = service.gate.state
        return JSONResponse({"status": state, "reason": service.engine.status().reason},
                            200 if state == "ready" else 503)

    @router.get("/metrics", response_class=PlainTextResponse, responses=_errors((401, 403, 431)))
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        return PlainTextResponse(service.metrics.render())

    return router


def _find_sources(body: SourcesRequest) -> list[Source]:
    documents = [Document(one.name, one.text) for one in body.documents]
    return SourceIndex(documents).find(body.answer, body.question)


async def _tokenize(service: Service, body: TokenizeRequest) -> Sequence[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Send either prompt or messages.", param="prompt")
    if body.messages is None:
        special = body.add_special_tokens is not False
        return await service.engine.tokenize(body.prompt or "", add_special_tokens=special)
    return await service.prompts.encode_chat(
        body, add_generation_prompt=body.add_generation_prompt,
        add_special_tokens=bool(body.add_special_tokens))


async def _detokenize(service: Service, ids: Sequence[int]) -> str:
    return await service.engine.detokenize(ids)


async def _spread(head: dict[str, Any], ids: Sequence[int]) -> AsyncIterator[str]:
    """Write a JSON object with a list of up to a million ids, in pieces so that nobody waits."""
    yield f'{json.dumps(head)[:-1]}, "tokens":['
    for start in range(0, len(ids), IDS_PER_PIECE):
        yield ("," if start else "") + ",".join(map(str, ids[start:start + IDS_PER_PIECE]))
        await asyncio.sleep(0)
    yield "]}"


# -- the schema ----------------------------------------------------------------------------------


def _docs(
    body: type[BaseModel], reply: type[BaseModel], can_stream: bool = False
) -> dict[str, Any]:
    """State a body's schema, which FastAPI does not see: bodies are read here, within limits."""
    schema = {"$ref": REF.format(model=body.__name__)}
    responses = _responses(reply, tuple(REFUSALS))
    if can_stream:
        responses[200]["content"] = replies.STREAM
    return {"responses": responses, "openapi_extra": {"requestBody": {
        "required": True, "content": {"application/json": {"schema": schema}}}}}


def _responses(reply: type[BaseModel], refusals: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": reply}, **_errors(refusals)}


def _errors(refusals: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": replies.ErrorReply, "description": REFUSALS[status]}
            for status in refusals}


def _openapi(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, bodies = models_json_schema(
            [(model, "validation") for model in BODIES], ref_template=REF)
        parts = schema.setdefault("components", {})
        parts.setdefault("schemas", {}).update(bodies["$defs"])
        if needs_key:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            schema["paths"]["/health"]["get"]["security"] = []
        app.openapi_schema = schema
    return app.openapi_schema
