"""The completions of one HTTP request, run side by side by the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from longspan.engine.front.client import AsyncEngine, GenerateRequest
from longspan.engine.front.stream import Stream
from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.recall import Recall, merged
from longspan.engine.request import (
    MAX_SEED,
    Event,
    Progress,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from longspan.serve.admission import Gate, Ticket
from longspan.serve.body import cancel
from longspan.serve.errors import ApiError

QUEUE_LEN = 256
"""Events kept for a slow reader before the engine's stream is left alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to compute: each prompt ``n`` times."""

    request_id: str
    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    """Parameters of each prompt."""
    n: int = 1
    echoes: Sequence[str] = ()
    """Text in front of each prompt's completions; empty: none."""


@dataclass(slots=True)
class Usage:
    """Tokens and times of a request."""

    arrived_s: float
    """Monotonic time."""
    predicted_ttft_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    origins: list[PrefixOrigin] = field(default_factory=list)
    """One for each of the prompts whose cached tokens were not all on the device."""
    recalls: list[Recall] = field(default_factory=list)
    """One for each of the prompts that were prefilled sparsely."""
    first_s: float | None = None
    last_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Arrival of the request to its first token."""
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def decode_s(self) -> float | None:
        """First token to last; None for one token."""
        if self.first_s is None or self.last_s is None or self.completion_tokens < 2:
            return None
        return self.last_s - self.first_s

    def as_dict(self) -> dict[str, object]:
        """OpenAI's usage object."""
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
                 "total_tokens": self.prompt_tokens + self.completion_tokens,
                 "prompt_tokens_details": {"cached_tokens": self.cached_tokens, **self._loaded()}}
        recall = self.recall
        if recall is None:
            return usage
        scouts = {} if recall.scouts is None else {"scouts": round(recall.scouts, 4)}
        return usage | {"attention_recall": {
            "typical": round(recall.typical, 4), **scouts, "num_tokens": recall.num_tokens}}

    @property
    def recall(self) -> Recall | None:
        """Recall of all prompts together, by tokens; None: nothing was prefilled sparsely."""
        return merged(self.recalls)

    def _loaded(self) -> dict[str, object]:
        """Say what came from host memory and disk, and how long the slowest took; empty: nothing
        did."""
        if not self.origins:
            return {}
        return {"host_tokens": sum(origin.num_host_tokens for origin in self.origins),
                "disk_tokens": sum(origin.num_disk_tokens for origin in self.origins),
                "load_ms": millis(max(origin.load_s for origin in self.origins))}

    def timings(self) -> dict[str, object]:
        """llama.cpp's timings, and the first token's predicted and actual time."""
        computed = self.prompt_tokens - self.cached_tokens
        ttft_s, decode_s = self.ttft_s, self.decode_s
        return {
            "cache_n": self.cached_tokens, "prompt_n": computed, "prompt_ms": millis(ttft_s),
            "prompt_per_second": round(computed / ttft_s, 3) if ttft_s else None,
            "predicted_n": self.completion_tokens, "predicted_ms": millis(decode_s),
            "predicted_per_second":
                round((self.completion_tokens - 1) / decode_s, 3) if decode_s else None,
            "ttft_ms": millis(ttft_s), "predicted_ttft_ms": millis(self.predicted_ttft_s)}


class Generation:
    """Runs a `Job`; events come out of `next_events` until `is_finished`.

    The first completion of each prompt starts at once, the others at its first token: they find
    the whole prompt in the prefix cache.
    """

    def __init__(self, engine: AsyncEngine, gate: Gate, ticket: Ticket) -> None:
        self.usage = Usage(arrived_s=ticket.arrived_s)
        self._engine, self._gate, self._ticket = engine, gate, ticket
        self._queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(QUEUE_LEN)
        self._tasks = list[asyncio.Task[None]]()
        self._unfinished = set[int]()
        self._leaders = list[asyncio.Event]()
        self._cached_tokens = list[int]()
        self._num_copies = 1
        self._scored = dict[int, Sequence[TokenLogprob]]()
        """Scores of prompts that are echoed, by their place."""

    @property
    def is_finished(self) -> bool:
        """Whether every completion has its finish reason."""
        return not self._unfinished

    @property
    def progress(self) -> tuple[int, int, int]:
        """Prompt tokens in all, from the cache, and in the KV cache by now."""
        parts = self._ticket.parts
        return (sum(part.prompt_len for part in parts),
                sum(self._cached_tokens),
                sum(part.done for part in parts))

    async def start(self, job: Job) -> None:
        """Hand the job to the engine. Raises the engine's refusal; `close` cleans up."""
        self._gate.resize(self._ticket, [len(prompt) for prompt in job.prompts])
        self.usage.prompt_tokens = sum(len(prompt) for prompt in job.prompts)
        self.usage.predicted_ttft_s = self._gate.predict_ttft_s(self._ticket)
        self._num_copies = job.n
        for index in range(len(job.prompts)):
            self._leaders.append(asyncio.Event())
            self._cached_tokens.append(0)
            self._unfinished.update(range(index * job.n, (index + 1) * job.n))
        for index in range(len(job.prompts)):
            stream = await self._engine.add(self._request(job, index, 0))
            self._tasks.append(asyncio.create_task(self._pump(job, index, 0, stream)))
            for copy in range(1, job.n):
                self._tasks.append(asyncio.create_task(self._follow(job, index, copy)))

    async def next_events(self, timeout_s: float | None = None) -> list[tuple[int, Event]]:
        """Return all waiting events, at least one; none after ``timeout_s``. Each has the index of
        its completion. Raises the first error of any completion."""
        try:
            async with asyncio.timeout(timeout_s):
                items = [await self._queue.get()]
        except TimeoutError:
            return []
        while not self._queue.empty():
            items.append(self._queue.get_nowait())
        return [(index, self._note(index, item)) for index, item in items]

    async def close(self) -> None:
        """Cancel whatever still runs."""
        await cancel(*self._tasks)

    # -- one completion ------------------------------------------------------------------------

    def _request(self, job: Job, index: int, copy: int) -> GenerateRequest:
        params = job.params[index]
        if copy and params.seed is not None:
            params = replace(params, seed=(params.seed + copy) & MAX_SEED)
        if copy and params.prompt_logprobs is not None:  # the first one has scored the prompt
            params = replace(params, prompt_logprobs=0,
                             prompt_logprobs_start=len(job.prompts[index]))
        return GenerateRequest(request_id=f"{job.request_id}-{index * job.n + copy}",
                               prompt=job.prompts[index], params=params)

    async def _follow(self, job: Job, index: int, copy: int) -> None:
        number = index * job.n + copy
        await self._leaders[index].wait()
        try:
            stream = await self._engine.add(self._request(job, index, copy))
        except Exception as error:
            await self._queue.put((number, error))
            return
        await self._pump(job, index, copy, stream)

    async def _pump(self, job: Job, index: int, copy: int, stream: Stream) -> None:
        number, is_first = index * job.n + copy, bool(job.echoes)
        try:
            async for event in stream:
                if is_first and isinstance(event, TokenEvent):
                    event, is_first = await self._echo(job, index, copy, event), False
                await self._queue.put((number, event))
                if isinstance(event, TokenEvent) and event.finish_reason is not None:
                    return
            await self._queue.put((number, ApiError(500, "The engine ended without a result.")))
        except Exception as error:
            await self._queue.put((number, error))
        finally:
            await stream.aclose()

    async def _echo(self, job: Job, index: int, copy: int, event: TokenEvent) -> TokenEvent:
        """Put the prompt in front of a completion's first event."""
        if copy == 0 and event.prompt_logprobs is not None:
            self._scored[index] = await self._engine.describe(
                job.prompts[index], event.prompt_logprobs)
        return replace(event, text=job.echoes[index] + event.text,
                       logprobs=(*self._scored.get(index, ()), *event.logprobs))

    # -- what is learnt from events ------------------------------------------------------------

    def _note(self, number: int, item: Event | Exception) -> Event:
        if isinstance(item, Exception):
            raise item
        index, copy = divmod(number, self._num_copies)
        if isinstance(item, Progress):
            if copy == 0:
                self._note_progress(index, item)
        else:
            self._note_token(number, index, copy, item)
        return item

    def _note_progress(self, index: int, event: Progress) -> None:
        part = self._ticket.parts[index]
        part.done = max(part.done, event.num_prefilled_tokens)
        if event.num_cached_tokens > self._cached_tokens[index]:
            self._cached_tokens[index] = event.num_cached_tokens
            if part.done == event.num_cached_tokens:  # admitted, but nothing is computed yet
                self.usage.predicted_ttft_s = self._gate.predict_ttft_s(self._ticket)

    def _note_token(self, number: int, index: int, copy: int, event: TokenEvent) -> None:
        if event.finish_reason == "abort":
            raise ApiError(503, "The engine cancelled this request.", code="cancelled")
        part = self._ticket.parts[index]
        part.done = part.prompt_len
        if copy == 0:
            self._cached_tokens[index] = event.num_cached_tokens
            self._leaders[index].set()
        self.usage.cached_tokens = sum(self._cached_tokens)
        if event.token_ids:
            self.usage.last_s = time.monotonic()
            self.usage.first_s = self.usage.first_s or self.usage.last_s
            self.usage.completion_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self._unfinished.discard(number)
        if event.output is not None and event.output.recall is not None:
            self.usage.recalls.append(event.output.recall)
        if copy == 0 and event.output is not None and event.output.prefix_origin is not None:
            self.usage.origins.append(event.output.prefix_origin)


def millis(seconds: float | None) -> float | None:
    """Convert seconds to milliseconds, rounded."""
    return None if seconds is None else round(1e3 * seconds, 3)
