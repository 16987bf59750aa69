"""Sharing of prefixes: blocks of a prompt that are cached, and blocks that another request is
computing. No torch.

A request whose prompt begins as one in prefill does not compute the same blocks a second time: it
waits until they are in the prefix cache. The running request *promises* the blocks that it will
register. A promise ends when the block is registered, or when the request is aborted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.engine.control.blocks import BlockPool, extend_hashes
from longspan.engine.control.chunking import cacheable_len, chunk_stop, tail_start
from longspan.engine.control.latency import LatencyModel
from longspan.engine.control.planner import PlannerConfig, prefill_s
from longspan.engine.control.tiers import Tiers
from longspan.engine.request import Request

WORTH_WAITING = 0.25
"""Share of a step's budget: a prefix that takes less to compute is computed, not waited for."""
PATIENCE = 2.0
"""A prompt waits for a prefix that another request computes only if it is there within this many
times its own time."""


def hash_prompt(request: Request, config: PlannerConfig) -> None:
    """Hash the prompt's full blocks, unless that was done.

    A million tokens take 10 ms and more. A front end does it on a helper thread when it makes a
    request. The scheduler does it for requests that come without, and no request gets a token
    meanwhile.
    """
    if not request.block_hashes:
        extend_hashes(request.block_hashes, request.prompt_ids, config.block_size,
                      _salts(request, config))


def _salts(request: Request, config: PlannerConfig) -> dict[int, bytes]:
    """Collect what blocks depend on besides the tokens up to their end; see
    `longspan.engine.control.blocks`."""
    if not request.sparse:
        return {0: config.cache_key + b"dense"}
    tail = tail_start(request.prompt_len, config.tail_len, config.block_size)
    salts, start, key = dict[int, bytes](), 0, config.cache_key
    while start < request.prompt_len:
        stop = chunk_stop(start, request.prompt_len, config.ladder, tail)
        tokens = request.prompt_ids[start:stop].tobytes()
        salts[start // config.block_size] = key + b"sparse" + tokens
        start, key = stop, b""
    return salts


@dataclass(slots=True)
class _Found:
    """The part of a waiting request's prompt that is cached or promised."""

    blocks: array[int]
    """Leading blocks in the prefix cache."""
    num_expected: int
    """Leading blocks that are cached or promised."""
    num_losses: int
    """`Prefixes._num_losses` at the time of the search."""


class Prefixes:
    """The prefix cache of one scheduler, in terms of requests."""

    def __init__(self, config: PlannerConfig, pool: BlockPool, latency: LatencyModel) -> None:
        self._config, self._pool, self._latency = config, pool, latency
        self._promises = dict[bytes, Request]()
        self._num_broken = 0
        self._found = dict[str, _Found]()
        self._worth_waiting_s = WORTH_WAITING * (config.step_budget_s or 0.0)

    def known_blocks(self, request: Request) -> array[int]:
        """Find the cached blocks that a waiting request can reuse."""
        blocks, size = self._look(request).blocks, self._config.block_size
        return blocks[: self._reusable_len(request, len(blocks) * size) // size]

    def known_places(self, request: Request, cached: array[int], tiers: Tiers) -> array[int]:
        """Find where the blocks are that an admitted request begins with, by the time that it would
        need without them.

        Args:
            cached: the device's blocks of its prompt, from `known_blocks`.

        Returns for each block the device's own that has its content, -1 where there is none.
        """
        size, hashes, start = self._config.block_size, request.block_hashes, len(cached)
        costs = self._latency.costs

        def compute_s(stop: int) -> float:
            return prefill_s(request, start * size, stop * size, self._config, costs)

        stop = tiers.worth_loading(
            hashes, start, compute_s,
            lambda count: self._reusable_len(request, count * size) // size)
        found = (self._pool.find(value) for value in hashes[start:stop])
        return cached + array("i", [-1 if block is None else block for block in found])

    def must_wait(self, request: Request) -> bool:
        """Tell whether another request is computing a longer prefix of this prompt than the cache
        holds, and will have it within `PATIENCE` times this one's own time."""
        if request.awaited_hash in self._promises:
            return True
        request.awaited_hash = b""
        found, size, hashes = self._look(request), self._config.block_size, request.block_hashes
        known, end = len(found.blocks), found.num_expected
        here, there = (self._reusable_len(request, count * size) for count in (known, end))
        if there <= here:
            return False
        awaited = next(hashes[index] for index in reversed(range(known, there // size))
                       if hashes[index] in self._promises)
        owner, costs = self._promises[awaited], self._latency.costs
        begun = min(there, max(owner.computed_len, owner.loading_len))
        owner_s = prefill_s(owner, begun, there, self._config, costs)
        own_s = prefill_s(request, here, there, self._config, costs)
        if owner_s > PATIENCE * own_s or own_s < self._worth_waiting_s:
            return False
        request.awaited_hash = awaited
        return True

    def promise(self, request: Request) -> None:
        """Note which blocks an admitted request's prefill will add to the prefix cache."""
        self._found.pop(request.request_id, None)
        stop = self._cacheable_len(request, request.prompt_len) // self._config.block_size
        for value in request.block_hashes[request.num_registered:stop]:
            self._promises.setdefault(value, request)

    def register(self, request: Request) -> None:
        """Tell the prefix cache about the blocks that are complete now."""
        size = self._config.block_size
        if request.computed_len // size <= request.num_registered:
            return  # no block has filled, as after nearly every decode
        num_blocks = self._cacheable_len(request, request.computed_len) // size
        if num_blocks > len(request.block_hashes):
            tokens = request.tokens(0, request.computed_len)
            extend_hashes(request.block_hashes, tokens, size, _salts(request, self._config))
        hashes = request.block_hashes
        for index in range(request.num_registered, num_blocks):
            parent = hashes[index - 1] if index else b""
            self._pool.register(request.block_ids[index], hashes[index], parent)
        self._keep_promises(request, request.num_registered, num_blocks)
        request.num_registered = max(request.num_registered, num_blocks)

    def forget(self, request: Request) -> None:
        """Drop a request that will register nothing more."""
        self._found.pop(request.request_id, None)
        self._num_broken += self._keep_promises(request, request.num_registered)

    def check(self, waiting: Sequence[Request]) -> None:
        """Assert that only requests in prefill have promised anything, and that what is remembered
        of those that wait is what a new search would find."""
        assert all(not request.is_finished and request.computed_len < request.prompt_len
                   for request in self._promises.values()), "a promise that nobody keeps"
        assert self._found.keys() <= {request.request_id for request in waiting}
        for request in waiting:
            found = self._found.get(request.request_id)
            if found is not None and found.num_losses == self._num_losses:
                hashes = request.block_hashes
                assert list(found.blocks) == self._pool.match(hashes[:len(found.blocks)])
                assert all(map(self._is_expected, hashes[:found.num_expected]))

    @property
    def _num_losses(self) -> int:
        """Number of events that made known prefixes shorter: blocks evicted, promises broken. All
        other events can only make them longer."""
        return self._pool.num_evictions + self._num_broken

    def _look(self, request: Request) -> _Found:
        """Search for a waiting request's prompt. A prefix is walked through once, and again only
        after a loss: dozens of prompts of a million tokens may wait while others decode."""
        hash_prompt(request, self._config)
        hashes, num_losses = request.block_hashes, self._num_losses
        found = self._found.get(request.request_id)
        if found is None or found.num_losses != num_losses:
            found = self._found[request.request_id] = _Found(array("i"), 0, num_losses)
        found.blocks.extend(self._pool.match(hashes, len(found.blocks)))
        end = max(found.num_expected, len(found.blocks))
        while end < len(hashes) and self._is_expected(hashes[end]):
            end += 1
        found.num_expected = end
        return found

    def _is_expected(self, value: bytes) -> bool:
        return value in self._promises or self._pool.knows(value)

    def _reusable_len(self, request: Request, num_tokens: int) -> int:
        """Count the tokens to reuse where ``num_tokens`` are known. The prompt's last one is always
        computed anew, and so is what log-probabilities of the prompt come from: the cache has none.
        """
        end, params = request.prompt_len - 1, request.params
        if params.prompt_logprobs is not None:
            end = min(end, max(0, params.prompt_logprobs_start - 1))
        return self._cacheable_len(request, min(num_tokens, end))

    def _keep_promises(self, request: Request, start: int, stop: int | None = None) -> int:
        """End the promises of blocks ``start`` to ``stop - 1``, which are registered or never will
        be. Returns how many there were."""
        kept = [value for value in request.block_hashes[start:stop]
                if self._promises.get(value) is request]
        for value in kept:
            del self._promises[value]
        return len(kept)

    def _cacheable_len(self, request: Request, num_tokens: int) -> int:
        return cacheable_len(
            num_tokens=num_tokens, prompt_len=request.prompt_len, sparse=request.sparse,
            ladder=self._config.ladder, block_size=self._config.block_size,
            tail_len=self._config.tail_len)
