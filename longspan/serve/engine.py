"""What the HTTP edge needs of an engine; `longspan.engine.front.client` provides it.

Tests use a double. Nothing here computes, and no call may block the event loop: tokenising,
rendering and detokenising happen elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from longspan.engine.front.client import EngineStatus, GenerateRequest
from longspan.engine.request import Progress, TokenEvent

Event = Progress | TokenEvent


class EventStream(Protocol):
    """The events of one request: an async generator."""

    def __aiter__(self) -> EventStream: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None:
        """Cancel the request, whatever it waits for; harmless after the end and when repeated."""


class AsyncEngine(Protocol):
    """An engine in other processes."""

    async def start(self) -> None:
        """Begin loading and return at once; `status` tells when it is ready or has failed."""

    async def add(self, request: GenerateRequest) -> EventStream:
        """Hand in a request. Returns once it is accepted, before anything is computed.

        The stream gives `Progress` at once (with the prompt's length), when the prefix cache
        supplied tokens (with as many prefilled as cached) and after each prefill chunk, then
        `TokenEvent`s, the last of them with a finish reason. Closing the stream, or cancelling
        this call, aborts the request.

        Raises:
            LongspanError: refused, or the engine died; ``http_status`` says which. The stream's
                ``__anext__`` raises it too, at any time.
        """

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Token ids of a text."""

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids. Raises `InvalidRequestError` for ids that do not exist."""

    async def render_chat(
        self, messages: Sequence[Mapping[str, Any]], **template_values: Any
    ) -> str:
        """The prompt text for a conversation, by the checkpoint's template, sandboxed."""

    def status(self) -> EngineStatus:
        """The present state; never waits."""

    async def drain(self) -> None:
        """Take no further requests; returns when the accepted ones are finished."""

    async def close(self) -> None:
        """Stop at once: abort everything and end the processes."""
