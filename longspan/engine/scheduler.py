"""Which tokens of which requests the next step computes. Ordinary Python: no torch, no sockets.

Policy, in the order of the functions below:

- *submit*: a request that can never fit is refused at once, with the numbers.
- *admit*: first come, first served. KV blocks for the prompt and all of ``max_tokens`` are taken
  at admission, so an admitted request always finishes: nothing is preempted, and no million-token
  prefill is ever thrown away. Of the first `LOOKAHEAD` in line, a shorter one may pass one that
  waits for blocks, but only `LOOKAHEAD` times, so that the long one is not starved.
- *budget*: a step computes one prefill chunk of the oldest prompt, one token of every decoding
  request, and what is left of ``prefill_chunk_len`` (at least half of it) goes to younger prompts.
  A short question therefore joins the step after its arrival, even behind a prefill of
  minutes.
- *apply*: results come back in order and change lengths, the prefix cache and the states.

Several steps may be in flight: `schedule` only looks at ``scheduled_len``. A request whose next
token is still being sampled goes on all the same: its slice says so, and the runner, which has the
token, feeds it in. Only a stop token comes as a surprise: slices that are in flight by then are
computed for nothing, their tokens are dropped here, and blocks come back with the last of them.
Steps run in the order of their submission, so a block that is given away after an interrupt is
written by its new owner after the old one's last step.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import zip_longest

from longspan.config import dense_tail_start
from longspan.engine.blocks import BlockPool, extend_hashes
from longspan.engine.chunking import cacheable_len, next_chunk_len
from longspan.engine.prompts import check_fits
from longspan.engine.request import FinishReason, Request, finish_reason
from longspan.engine.step import (
    NO_TOKEN,
    RowLogprobs,
    RowSampling,
    SamplingExtras,
    ScheduledBatch,
    ScheduledSlice,
    StepResult,
    Update,
)

LOOKAHEAD = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Numbers that the scheduler works with."""

    num_blocks: int
    block_size: int
    max_model_len: int
    prefill_chunk_len: int
    max_num_requests: int
    dense_tail_len: int = 0
    """Last prompt tokens that attend to everything in sparse prefill."""

    @property
    def longest_len(self) -> int:
        """Longest prompt plus completion that can be accepted, tokens."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a scheduler has to do at one moment."""

    num_waiting: int = 0
    """Requests without KV blocks."""
    num_running: int = 0
    """Requests in prefill or decode."""
    num_waiting_tokens: int = 0
    """Prompt tokens of the waiting requests."""
    num_used_tokens: int = 0
    """Tokens of KV reserved for running requests, in whole blocks."""


class Scheduler:
    """Owns the requests and the blocks; `schedule` hands out work, `apply` takes results."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self._waiting: list[Request] = []
        self._running: dict[str, Request] = {}
        self._in_flight: list[tuple[ScheduledBatch, list[Request]]] = []
        self._updates: list[Update] = []
        self._free_slots = list(range(config.max_num_requests))
        self._num_steps = 0
        self.epoch = 0
        """Number of times that `drop_in_flight` was called."""

    @property
    def is_idle(self) -> bool:
        """No request is waiting or running, no step in flight, no update uncollected."""
        return not (self._waiting or self._running or self._in_flight or self._updates)

    @property
    def num_requests(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + len(self._running)

    @property
    def load(self) -> Load:
        """What there is to do now."""
        num_used = self.pool.num_blocks - self.pool.num_available
        return Load(
            num_waiting=len(self._waiting), num_running=len(self._running),
            num_waiting_tokens=sum(request.prompt_len for request in self._waiting),
            num_used_tokens=num_used * self.config.block_size)

    def add(self, request: Request) -> None:
        """Queue a request. Raises `PromptTooLongError` if it could never be computed."""
        check_fits(request.prompt_len, request.params.max_tokens, self.config.longest_len)
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Cancel a request in any state; unknown and finished ones are ignored.

        Its blocks become available when the last step in flight that writes them has returned.
        """
        waiting = next((r for r in self._waiting if r.request_id == request_id), None)
        if waiting is not None:
            self._waiting.remove(waiting)
        request = waiting or self._running.get(request_id)
        if request is not None and not request.is_finished:
            self._finish(request, "abort")
            self._updates.append(_update(request, None))

    def schedule(self) -> ScheduledBatch | None:
        """Work for the next step, or None when nothing can be computed now."""
        self._admit()
        chosen = self._budget()
        if not chosen:
            assert self._in_flight or not self._waiting, "an empty engine admits any request"
            return None
        slices = tuple(_slice(request, query_len) for request, query_len in chosen)
        batch = ScheduledBatch(step_id=self._num_steps, epoch=self.epoch, slices=slices)
        for request, query_len in chosen:
            request.scheduled_len += query_len
            request.num_in_flight += 1
        self._num_steps += 1
        self._in_flight.append((batch, [request for request, _ in chosen]))
        return batch

    def apply(self, result: StepResult) -> list[Update]:
        """Take the result of the oldest step in flight. Returns what changed, aborts included.

        A result of an earlier epoch changes nothing.
        """
        if result.epoch != self.epoch:
            return self.take_updates()
        batch, requests = self._in_flight.pop(0)
        assert result.step_id == batch.step_id, "results are applied in the order of their steps"
        sampled = iter(zip_longest(result.token_ids, result.logprobs))
        for item, request in zip(batch.slices, requests, strict=True):
            token, logprobs = next(sampled) if item.sampling is not None else (None, None)
            self._advance(request, item, token, logprobs)
        assert next(sampled, None) is None, "more tokens than slices that sample"
        return self.take_updates()

    def drop_in_flight(self) -> None:
        """Forget the steps in flight (an interrupt): their requests are aborted, and results that
        still come belong to an earlier epoch."""
        self.epoch += 1
        for _, requests in self._in_flight:
            for request in requests:
                request.num_in_flight = 0
                if not request.is_finished:
                    self._finish(request, "abort")
                    self._updates.append(_update(request, None))
                elif request.request_id in self._running:
                    self._release(request)
        self._in_flight.clear()

    def take_updates(self) -> list[Update]:
        """Changes not yet handed out."""
        updates, self._updates = self._updates, []
        return updates

    def check(self) -> None:
        """Assert that blocks and requests agree; cheap enough for every idle moment."""
        self.pool.check()
        held = {block for request in self._running.values() for block in request.block_ids}
        assert len(held) == self.pool.num_blocks - self.pool.num_available, "blocks leaked"
        assert not any(request.block_ids for request in self._waiting)
        slots = [*self._free_slots, *(request.slot for request in self._running.values())]
        assert sorted(slots) == list(range(self.config.max_num_requests)), "slots leaked"

    # -- admit ---------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move waiting requests to running as long as blocks and places last."""
        position = 0
        while (position < min(len(self._waiting), LOOKAHEAD)
               and len(self._running) < self.config.max_num_requests):
            request = self._waiting[position]
            if self._allocate(request):
                del self._waiting[position]
                request.slot = heappop(self._free_slots)
                self._running[request.request_id] = request
                for passed in self._waiting[:position]:
                    passed.num_skips += 1
            elif request.num_skips >= LOOKAHEAD:
                return
            else:
                position += 1

    def _allocate(self, request: Request) -> bool:
        """Take all blocks a request can ever need, cached ones first; False if too few are left."""
        cached = self._cached_blocks(request)
        num_new = -(-request.reserved_len // self.config.block_size) - len(cached)
        if num_new > self.pool.num_available:
            return False
        self.pool.acquire(cached)
        new = self.pool.allocate(num_new, after=cached[-1] if cached else None)
        if new is None:
            self.pool.release(cached)
            return False
        request.block_ids = cached + new
        request.num_registered = len(cached)
        cached_len = len(cached) * self.config.block_size
        request.num_cached_tokens = request.scheduled_len = request.computed_len = cached_len
        return True

    def _cached_blocks(self, request: Request) -> list[int]:
        """Known blocks of the prompt. At least its last token is always computed anew."""
        if not request.block_hashes:
            extend_hashes(request.block_hashes, request.prompt_ids, self.config.block_size,
                          self._salts(request))
        found = self.pool.match(request.block_hashes)
        num_tokens = min(len(found) * self.config.block_size, request.prompt_len - 1)
        return found[: self._cacheable_len(request, num_tokens) // self.config.block_size]

    # -- budget --------------------------------------------------------------------------------

    def _budget(self) -> list[tuple[Request, int]]:
        """(request, query_len) of the next step: prefills, oldest first, then decodes."""
        running = [request for request in self._running.values() if not request.is_finished]
        chunk = self.config.prefill_chunk_len
        prefills: list[tuple[Request, int]] = []
        budget = chunk
        for request in running:
            if request.is_prefill:
                query_len = self._chunk_len(request, budget)
                if query_len:
                    budget -= query_len
                    if not prefills:
                        budget = max(budget, chunk // 2)
                    prefills.append((request, query_len))
        decodes = [(request, 1) for request in running if _can_decode(request)]
        return prefills + decodes

    def _chunk_len(self, request: Request, budget: int) -> int:
        return next_chunk_len(
            cached_len=request.scheduled_len, prompt_len=request.prompt_len, budget=budget,
            prefill_chunk_len=self.config.prefill_chunk_len, block_size=self.config.block_size,
            sparse=request.sparse)

    # -- apply ---------------------------------------------------------------------------------

    def _advance(
        self, request: Request, item: ScheduledSlice, token: int | None,
        logprobs: RowLogprobs | None,
    ) -> None:
        request.num_in_flight -= 1
        if request.is_finished:  # stopped or aborted while the step was in flight
            self._release(request)
            return
        request.computed_len = item.context_len
        if token == NO_TOKEN:
            token = None
            self._finish(request, "abort")
        if token is not None:
            request.output_ids.append(token)
        self._register(request)
        reason = None if token is None else finish_reason(
            request.params, request.eos_token_ids, token, len(request.output_ids))
        if reason is not None:
            self._finish(request, reason)
        self._updates.append(_update(request, token, logprobs))

    def _register(self, request: Request) -> None:
        """Tell the prefix cache about the blocks that are complete now."""
        size = self.config.block_size
        num_blocks = self._cacheable_len(request, request.computed_len) // size
        if num_blocks > len(request.block_hashes):
            tokens = request.tokens(0, request.computed_len)
            extend_hashes(request.block_hashes, tokens, size, self._salts(request))
        for index in range(request.num_registered, num_blocks):
            self.pool.register(request.block_ids[index], request.block_hashes[index])
        request.num_registered = max(request.num_registered, num_blocks)

    def _cacheable_len(self, request: Request, num_tokens: int) -> int:
        return cacheable_len(
            num_tokens=num_tokens, prompt_len=request.prompt_len, sparse=request.sparse,
            prefill_chunk_len=self.config.prefill_chunk_len, block_size=self.config.block_size,
            dense_tail_len=self.config.dense_tail_len)

    def _salts(self, request: Request) -> dict[int, bytes]:
        """What blocks not yet hashed depend on besides the tokens up to their end: see `blocks`."""
        if not request.sparse:
            return {0: b"dense"}
        config = self.config
        tail_start = dense_tail_start(request.prompt_len, config.dense_tail_len)
        salts, chunk = dict[int, bytes](), config.prefill_chunk_len
        first = len(request.block_hashes) * config.block_size // chunk * chunk
        for start in range(first, tail_start + 1, chunk):
            stop = start + chunk
            tail = b"" if stop <= tail_start else b"tail%d" % tail_start
            tokens = request.prompt_ids[start:min(stop, tail_start)].tobytes()
            salts[start // config.block_size] = b"sparse" + tail + tokens
        return salts

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        self._release(request)

    def _release(self, request: Request) -> None:
        """Give the blocks of a finished request back, once no step in flight writes them."""
        if request.num_in_flight == 0 and request.request_id in self._running:
            del self._running[request.request_id]
            heappush(self._free_slots, request.slot)
            self.pool.release(request.block_ids)
            request.block_ids = []


def max_step_tokens(prefill_chunk_len: int, max_num_requests: int) -> int:
    """Most tokens that one step computes: the oldest prompt's chunk, half as many tokens of others,
    one token of each decoding request."""
    return prefill_chunk_len + prefill_chunk_len // 2 + max_num_requests


def _slice(request: Request, query_len: int) -> ScheduledSlice:
    start, stop = request.scheduled_len, request.scheduled_len + query_len
    params, is_last = request.params, stop >= request.prompt_len
    sampling = RowSampling(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p,
        min_p=params.min_p, seed=request.seed) if is_last else None
    return ScheduledSlice(
        request_id=request.request_id, slot=request.slot, token_ids=request.tokens(start, stop),
        cached_len=start, prompt_len=request.prompt_len, block_ids=request.block_ids,
        sparse=request.sparse, sampling=sampling,
        extras=SamplingExtras.of(request) if stop == request.prompt_len else None)


def _can_decode(request: Request) -> bool:
    """The next token can be computed: its input is known, or will be known to the runner, and a
    completion of ``max_tokens`` is not full with what is in flight."""
    if request.is_prefill or request.scheduled_len >= request.reserved_len - 1:
        return False
    return not (request.awaits_token and request.params.needs_grammar)


def _update(
    request: Request, token: int | None, logprobs: RowLogprobs | None = None,
) -> Update:
    return Update(
        request_id=request.request_id, computed_len=request.computed_len,
        num_cached_tokens=request.num_cached_tokens, token_id=token,
        finish_reason=request.finish_reason, logprobs=logprobs)
