"""Which blocks of a prompt are known, and which are on their way: sharing of prefixes. No torch.

A request whose prompt begins as one that is being prefilled does not compute the same blocks a
second time: it waits until they are in the prefix cache. The running request *promises* the
blocks that it will register; promises end when they are kept, or when it is aborted.
"""

from __future__ import annotations

from longspan.config import dense_tail_start
from longspan.engine.blocks import BlockPool, extend_hashes
from longspan.engine.chunking import cacheable_len
from longspan.engine.latency import LatencyModel
from longspan.engine.planner import PlannerConfig, prefill_s
from longspan.engine.request import Request

WORTH_WAITING = 0.25
"""Share of a step's budget: a prefix that takes less to compute is computed, not waited for."""
PATIENCE = 2.0
"""A prompt waits for a prefix that another request computes if that takes at most so many times as
long as this one would need itself."""


def hash_prompt(request: Request, config: PlannerConfig) -> None:
    """Work out the hashes of the prompt's full blocks, unless they are known.

    A million tokens take 10 ms and more. Who makes a request does this beside everything else;
    in the scheduler, which does it for requests that come without, nobody gets a token meanwhile.
    """
    if not request.block_hashes:
        extend_hashes(request.block_hashes, request.prompt_ids, config.block_size,
                      _salts(request, config))


def _salts(request: Request, config: PlannerConfig) -> dict[int, bytes]:
    """What blocks not yet hashed depend on besides the tokens up to their end: see `blocks`."""
    if not request.sparse:
        return {0: b"dense"}
    tail_start = dense_tail_start(request.prompt_len, config.dense_tail_len)
    salts, chunk = dict[int, bytes](), config.prefill_chunk_len
    first = len(request.block_hashes) * config.block_size // chunk * chunk
    for start in range(first, tail_start + 1, chunk):
        stop = start + chunk
        tail = b"" if stop <= tail_start else b"tail%d" % tail_start
        tokens = request.prompt_ids[start:min(stop, tail_start)].tobytes()
        salts[start // config.block_size] = b"sparse" + tail + tokens
    return salts


class Prefixes:
    """The prefix cache of one scheduler, seen from its requests."""

    def __init__(self, config: PlannerConfig, pool: BlockPool, latency: LatencyModel) -> None:
        self._config, self._pool, self._latency = config, pool, latency
        self._promises = dict[bytes, Request]()
        self._worth_waiting_s = WORTH_WAITING * (config.step_budget_s or 0.0)

    def known_blocks(self, request: Request) -> list[int]:
        """Known blocks of the prompt."""
        hash_prompt(request, self._config)
        found = self._pool.match(request.block_hashes)
        size = self._config.block_size
        return found[: self._reusable_len(request, len(found) * size) // size]

    def awaits(self, request: Request) -> bool:
        """Another request is computing a longer prefix of this prompt than the cache holds, and
        will have it no much later than this one would by itself."""
        if request.awaited_hash in self._promises:
            return True
        hash_prompt(request, self._config)
        request.awaited_hash = b""
        size, hashes = self._config.block_size, request.block_hashes
        known = end = len(self._pool.match(hashes))
        while end < len(hashes) and self._is_expected(hashes[end]):
            end += 1
        here, there = (self._reusable_len(request, count * size) for count in (known, end))
        awaited = [value for value in hashes[known:there // size] if value in self._promises]
        if there <= here or not awaited:
            return False
        owner, costs = self._promises[awaited[-1]], self._latency.costs
        owner_s = prefill_s(owner, owner.computed_len, there, self._config, costs)
        own_s = prefill_s(request, here, there, self._config, costs)
        if owner_s > PATIENCE * own_s or own_s < self._worth_waiting_s:
            return False
        request.awaited_hash = awaited[-1]
        return True

    def promise(self, request: Request) -> None:
        """Note which blocks this request's prefill will add to the prefix cache."""
        stop = self._cacheable_len(request, request.prompt_len) // self._config.block_size
        for value in request.block_hashes[request.num_registered:stop]:
            self._promises.setdefault(value, request)

    def register(self, request: Request) -> None:
        """Tell the prefix cache about the blocks that are complete now."""
        size = self._config.block_size
        if request.computed_len // size <= request.num_registered:
            return  # none has filled: so it is after nearly every decode
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
        """Nothing more of this request will be registered."""
        self._keep_promises(request, request.num_registered)

    def check(self) -> None:
        """Assert that only requests in prefill have promised anything."""
        assert all(not request.is_finished and request.computed_len < request.prompt_len
                   for request in self._promises.values()), "a promise that nobody keeps"

    def _is_expected(self, value: bytes) -> bool:
        return value in self._promises or self._pool.knows(value)

    def _reusable_len(self, request: Request, num_tokens: int) -> int:
        """Of so many known tokens, those to reuse. The last one is always computed anew."""
        return self._cacheable_len(request, min(num_tokens, request.prompt_len - 1))

    def _keep_promises(self, request: Request, start: int, stop: int | None = None) -> None:
        """Blocks ``start`` to ``stop - 1`` are registered, or never will be."""
        for value in request.block_hashes[start:stop]:
            if self._promises.get(value) is request:
                del self._promises[value]

    def _cacheable_len(self, request: Request, num_tokens: int) -> int:
        return cacheable_len(
            num_tokens=num_tokens, prompt_len=request.prompt_len, sparse=request.sparse,
            prefill_chunk_len=self._config.prefill_chunk_len, block_size=self._config.block_size,
            dense_tail_len=self._config.dense_tail_len)
