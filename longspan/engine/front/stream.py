"""The events of one request, for asyncio. No torch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from longspan.engine.request import Event, Progress, TokenEvent
from longspan.engine.text.completion import Completion

MAX_UNREAD = 64
"""Most events that wait for a slow reader; more are joined to fewer and longer ones."""


class Channel:
    """Holds the events between the client, which adds them, and the stream's reader. It belongs to
    the event loop."""

    def __init__(self, completion: Completion) -> None:
        self.completion = completion
        self.is_closed = False
        self.error: Exception | None = None
        """To be raised once the events before it are read."""
        self._news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """No further event will come."""
        return self.completion.is_finished or self.is_closed or self.error is not None

    def wake(self) -> None:
        """Tell the reader that there are new events."""
        if len(self.completion.events) > MAX_UNREAD:
            _join_pairs(self.completion.events)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End with an error, unless it has ended."""
        if not self.is_over:
            self.error = error
            self._news.set()

    def close(self) -> None:
        """End without an error; what is unread is dropped."""
        self.is_closed = True
        self.completion.events.clear()
        self._news.set()

    async def read(self) -> Event | None:
        """Wait for the next event; None at the end. Raises `error`, or the completion's."""
        while not self.completion.events:
            error = self.error or self.completion.error
            if error is not None and not self.is_closed:
                raise error
            if self.is_over:
                return None
            self._news.clear()
            await self._news.wait()
        return self.completion.events.popleft()


class Stream:
    """An async iterator over the events of one request. Closing it cancels the request, and so
    does losing it unclosed: a task that is cancelled before it starts never reaches its cleanup.

    Args:
        cancel: called once, on the event loop, unless the request has ended by then.
    """

    def __init__(
        self, channel: Channel, cancel: Callable[[], None], loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._channel, self._cancel, self._loop = channel, cancel, loop

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        event = await self._channel.read()
        if event is None:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        """Cancel the request, whatever it waits for; harmless after the end and when repeated."""
        is_over = self._channel.is_over
        self._channel.close()
        if not is_over:
            self._cancel()

    def __del__(self) -> None:
        # Any thread may collect it. A closed event loop has no engine any more.
        if not self._channel.is_over:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel)


def _join_pairs(events: deque[Event]) -> None:
    """Join each event with the next one where both are of a kind: half as many hold all the text.

    In pairs and not all at once, so that a text is copied once for each doubling of its length.
    """
    before = list(events)
    events.clear()
    while before:
        event = before.pop()
        if before and (joined := _joined(before[-1], event)) is not None:
            before.pop()
            event = joined
        events.appendleft(event)


def _joined(first: Event, second: Event) -> Event | None:
    if isinstance(first, Progress) and isinstance(second, Progress):
        return second
    if isinstance(first, TokenEvent) and isinstance(second, TokenEvent):
        return replace(
            second, text=first.text + second.text, token_ids=first.token_ids + second.token_ids,
            logprobs=first.logprobs + second.logprobs)
    return None
