"""Admission: limits by bytes and tokens, the queue, and how long a request will wait.

A request holds a `Ticket` from its headers to its last byte. Its size is first guessed from the
bytes announced, so that a full queue refuses before anything is read or tokenised. It is checked
again when the prompts are tokenised: the guess may have been short, and a chunked body announces
nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from longspan.engine.front.client import EngineState, EngineStatus
from longspan.serve.config import ServeConfig
from longspan.serve.errors import ApiError

BYTES_PER_TOKEN = 4.0
"""First guess; a running mean replaces it."""
MIN_BODY_BYTES = 1 << 20
UNMEASURED_TOKENS_PER_S = 2_000.0
"""Prefill of a small machine, for Retry-After of a server that has only just been started."""
LOADING_RETRY_S = 5.0
DRAINING_RETRY_S = 30.0


@dataclass(slots=True)
class Part:
    """One prompt of a request."""

    prompt_len: int
    done: int = 0
    """Tokens in the KV cache, cached ones included."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place in the queue."""

    parts: list[Part]
    num_bytes: int
    arrived_s: float
    """Monotonic time."""

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return sum(part.prompt_len - part.done for part in self.parts)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.arrived_s


class Gate:
    """Admits requests, and predicts from those present how long the next one waits."""

    def __init__(self, config: ServeConfig, status: Callable[[], EngineStatus]) -> None:
        self.is_draining = False
        self._config, self._status = config, status
        self._tickets: set[Ticket] = set()
        self._num_buffered_bytes = 0
        self._bytes_per_token = BYTES_PER_TOKEN
        self._idle = asyncio.Event()
        self._idle.set()

    # -- limits --------------------------------------------------------------------------------

    @property
    def max_body_bytes(self) -> int:
        """Longest body accepted."""
        return self._config.max_body_bytes or max(
            MIN_BODY_BYTES, 16 * self._status().max_model_len)

    @property
    def max_buffered_bytes(self) -> int:
        """Bodies in memory together."""
        return self._config.max_buffered_bytes or 4 * self.max_body_bytes

    @property
    def max_queued_tokens(self) -> int:
        """Prompt tokens waiting together."""
        return self._config.max_queued_tokens or 4 * self._status().max_model_len

    # -- state ---------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """State of engine and server together."""
        state = self._status().state
        return "draining" if state == "ready" and self.is_draining else state

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed."""
        return sum(ticket.queued_tokens for ticket in self._tickets)

    @property
    def num_queued(self) -> int:
        """Requests accepted whose prompts are not yet computed."""
        return sum(ticket.queued_tokens > 0 for ticket in self._tickets)

    @property
    def num_open(self) -> int:
        """Requests accepted and not yet answered in full."""
        return len(self._tickets)

    async def wait_idle(self) -> None:
        """Wait until no request is left."""
        await self._idle.wait()

    def check_open(self) -> None:
        """Raise 503 unless requests can be served."""
        state, reason = self.state, self._status().reason
        if state == "loading":
            raise ApiError(503, "The model is being loaded; try again shortly.", code="loading",
                           retry_after_s=LOADING_RETRY_S)
        if state == "draining":
            raise ApiError(503, "The server is shutting down.", code="draining",
                           retry_after_s=DRAINING_RETRY_S)
        if state == "dead":
            raise ApiError(503, f"The engine has stopped: {reason or 'no reason is known'}.",
                           code="engine_dead")

    # -- entering and leaving ------------------------------------------------------------------

    @contextmanager
    def enter(self, num_bytes: int) -> Iterator[Ticket]:
        """Admit a request whose body has this many bytes (0: not announced).

        Raises 503 and 429. A request larger than the whole budget enters an empty queue.
        """
        self.check_open()
        num_tokens = int(num_bytes / self._bytes_per_token)
        self._check_room(num_tokens, self._tickets)
        ticket = Ticket([Part(num_tokens)], num_bytes, time.monotonic())
        self._tickets.add(ticket)
        self._idle.clear()
        try:
            yield ticket
        finally:
            self._tickets.discard(ticket)
            if not self._tickets:
                self._idle.set()

    @contextmanager
    def buffer(self) -> Iterator[Callable[[int], None]]:
        """Count the bytes of one body while it is in memory; the function raises 413 and 429."""
        held = 0

        def take(num_bytes: int) -> None:
            nonlocal held
            held += num_bytes
            self._num_buffered_bytes += num_bytes
            self.check_body(held)
            if self._num_buffered_bytes > self.max_buffered_bytes and \
                    self._num_buffered_bytes > held:
                raise ApiError(429, "Too many request bodies are being received; try again "
                               "shortly.", code="busy", retry_after_s=1.0)

        try:
            yield take
        finally:
            self._num_buffered_bytes -= held

    def check_body(self, num_bytes: int) -> None:
        """Raise 413 for a body of this length."""
        if num_bytes > self.max_body_bytes:
            raise ApiError(413, f"The request body is longer than {self.max_body_bytes} bytes, "
                           "the limit of this server.", code="request_too_large")

    def resize(self, ticket: Ticket, prompt_lens: Sequence[int]) -> None:
        """Replace the guess by the true lengths of the tokenised prompts. Raises 429 where these do
        not fit beside the other requests."""
        self._check_room(sum(prompt_lens), self._tickets - {ticket})
        ticket.parts = [Part(length) for length in prompt_lens]
        if ticket.num_bytes and sum(prompt_lens):
            ratio = min(64.0, ticket.num_bytes / sum(prompt_lens))
            self._bytes_per_token += 0.1 * (ratio - self._bytes_per_token)

    def _check_room(self, num_tokens: int, others: Collection[Ticket]) -> None:
        waiting = [ticket.queued_tokens for ticket in others if ticket.queued_tokens]
        queued, limit = sum(waiting), self.max_queued_tokens
        if queued and queued + num_tokens > limit:
            share = min(1.0, (queued + num_tokens - limit) / queued)
            raise ApiError(
                429, f"The queue is full: {queued} prompt tokens wait, this request has about "
                f"{num_tokens}, the limit is {limit}.", code="queue_full",
                retry_after_s=share * self._backlog_s(others), details={
                    "queued_tokens": queued, "limit": limit})
        if len(waiting) >= self._config.max_queued_requests:
            raise ApiError(
                429, f"The queue is full: {len(waiting)} requests wait.", code="queue_full",
                retry_after_s=self._backlog_s(others) / len(waiting))

    # -- prediction ----------------------------------------------------------------------------

    def backlog_s(self) -> float:
        """Predict the seconds to compute every waiting prompt; before any measurement at
        `UNMEASURED_TOKENS_PER_S`."""
        return self._backlog_s(self._tickets)

    def predict_ttft_s(self, ticket: Ticket) -> float | None:
        """Predict a request's seconds from arrival to first token; None before any measurement.

        The scheduler lets short prompts pass long ones, so each other prompt delays this one by
        its own rest at the most, and by no more than the rest of this one.
        """
        others = (other for other in self._tickets if other is not ticket)
        left_s = self._with_others(self._left_s(ticket), others)
        return ticket.elapsed_s + left_s if self._is_measured else None

    def predict_new_s(self, prompt_len: int) -> float | None:
        """Predict the seconds to first token of a prompt that arrives now; None as above."""
        own_s = self._prefill_s(Part(prompt_len))
        return self._with_others(own_s, self._tickets) if self._is_measured else None

    @property
    def _is_measured(self) -> bool:
        return self._status().latency is not None

    def _backlog_s(self, tickets: Collection[Ticket]) -> float:
        return sum(map(self._left_s, tickets))

    def _with_others(self, own_s: float, others: Iterator[Ticket] | set[Ticket]) -> float:
        return own_s + sum(min(own_s, self._left_s(other)) for other in others)

    def _left_s(self, ticket: Ticket) -> float:
        return sum(self._prefill_s(part) for part in ticket.parts)

    def _prefill_s(self, part: Part) -> float:
        latency = self._status().latency
        if latency is None:
            return (part.prompt_len - part.done) / UNMEASURED_TOKENS_PER_S
        return latency.prefill_s(part.done, part.prompt_len)
