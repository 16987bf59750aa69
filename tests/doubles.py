"""Test doubles: a runner that checks the KV cache it is given, transports, a byte tokenizer."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

from longspan.engine.request import Request, SamplingParams
from longspan.engine.step import ScheduledBatch, ScheduledSlice, StepResult

VOCAB_SIZE = 50
EOS = 0


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: a fixed pseudo-random function of the whole context."""
    return random.Random(repr(list(tokens))).randrange(VOCAB_SIZE)


def complete(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """What the fake model answers when nothing else runs."""
    tokens, output = list(prompt), []
    while len(output) < params.max_tokens:
        output.append(next_token(tokens + output))
        stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, EOS)
        if output[-1] in stops:
            break
    return output


def make_request(
    request_id: str, prompt: Sequence[int], *, sparse: bool = False, **params: Any,
) -> Request:
    """A request for the fake model."""
    return Request(
        request_id=request_id, prompt_ids=array("i", prompt), params=SamplingParams(**params),
        eos_token_ids=frozenset({EOS}), sparse=sparse)


class FakeRunner:
    """Keeps in each slot what the real keys would depend on, and checks it on every read.

    Dense: the tokens up to the slot. Sparse: the tokens up to the prefill chunk's end, and whether
    the slot lies in the dense tail. A wrong block, a block reused too early or a cache hit on
    something impure fails an assertion.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, prefill_chunk_len: int, dense_tail_len: int = 0,
    ) -> None:
        self.block_size, self.chunk, self.tail = block_size, prefill_chunk_len, dense_tail_len
        self.slots: list[object] = [None] * (num_blocks * block_size)
        self.tokens: list[int] = [-1] * (num_blocks * block_size)
        self.num_computed = 0
        self.batches: list[ScheduledBatch] = []

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Write, check, sample."""
        self.batches.append(batch)
        kinds = [item.context_len > item.prompt_len for item in batch.slices]
        assert kinds == sorted(kinds), "prefill slices come before decodes"
        tokens = [self._run(item) for item in batch.slices]
        self.num_computed += batch.num_tokens
        return StepResult(
            step_id=batch.step_id, token_ids=tuple(t for t in tokens if t is not None),
            kept_pairs=1.0, causal_pairs=4.0)

    def _run(self, item: ScheduledSlice) -> int | None:
        slots = [item.block_ids[p // self.block_size] * self.block_size + p % self.block_size
                 for p in range(item.context_len)]
        for slot, token in zip(slots[item.cached_len:], item.token_ids, strict=True):
            self.tokens[slot] = token
        context = [self.tokens[slot] for slot in slots]
        for position in range(item.cached_len, item.context_len):
            self.slots[slots[position]] = self._written(item, context, position)
        for position, slot in enumerate(slots):
            assert self.slots[slot] == self._expected(item, context, position), (item, position)
        return next_token(context) if item.sampling is not None else None

    def _written(self, item: ScheduledSlice, context: list[int], position: int) -> object:
        if not item.sparse or position >= item.prompt_len:
            return hash(tuple(context[: position + 1]))
        in_tail = position >= item.prompt_len - self.tail
        return hash((*context[: min(item.context_len, item.prompt_len)], in_tail))

    def _expected(self, item: ScheduledSlice, context: list[int], position: int) -> object:
        """What a run without any cache would have written."""
        if not item.sparse or position >= item.prompt_len:
            return hash(tuple(context[: position + 1]))
        end = min((position // self.chunk + 1) * self.chunk, item.prompt_len)
        return hash((*context[:end], position >= item.prompt_len - self.tail))


class DeepTransport:
    """Computes at submission and hands results out later: several steps in flight."""

    def __init__(self, executor: FakeRunner, max_in_flight: int) -> None:
        self.executor, self.max_in_flight = executor, max_in_flight
        self.results: deque[StepResult] = deque()

    def submit(self, batch: ScheduledBatch) -> None:
        """Compute now."""
        self.results.append(self.executor.execute(batch))

    def collect(self) -> StepResult:
        """The oldest result."""
        return self.results.popleft()

    def discard(self) -> None:
        """Lose everything in flight."""
        self.results.clear()
