"""Steps that a server computes before its first request only to compile kernels. No torch.

Kernels are compiled for sizes by powers of two, among them the context's: without these steps the
first long prompt would wait for the compiler in every other chunk, and with it all other requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from longspan.engine.control.scheduler import SchedulerConfig
from longspan.engine.step import ScheduledBatch, ScheduledSlice

NUM_QUERIES = 512
"""Queries of a dense step: enough to trigger every kernel."""
PAIRS = 1 << 31
"""Queries of a sparse step times its context: so many have the scouts that a context of that length
asks for (`ops.geometry.num_scouts`), and kernels are compiled for their number."""
FIRST_LEN = 32_768
"""Shortest context that is worth a step: shorter ones are compiled for in a moment."""


def context_lens(config: SchedulerConfig) -> list[int]:
    """Return `FIRST_LEN`, its doublings and the longest, as multiples of a KV block."""
    size, longest = config.block_size, config.longest_len
    found, length = list[int](), min(config.prefill_chunk_len, FIRST_LEN)
    while length < longest:
        found.append(length // size * size)
        length *= 2
    found.append(longest // size * size)
    return [length for length in found if length > NUM_QUERIES]


def compile_steps(config: SchedulerConfig) -> Iterator[ScheduledBatch]:
    """Prefill steps at the end of ever longer contexts, dense and, where the engine has it, sparse.
    They write to blocks that no request has yet, and sample nothing."""
    modes = [False] if config.sparse_above is None else [False, True]
    for length in context_lens(config):
        for is_sparse in modes:
            queries = _sparse_queries(length, config) if is_sparse else NUM_QUERIES
            item = ScheduledSlice(
                request_id="compile-ahead", token_ids=array("i", [0] * queries), sampling=None,
                cached_len=length - queries, sparse=is_sparse,
                prompt_len=length + config.block_size,
                block_ids=range(length // config.block_size))
            yield ScheduledBatch(step_id=0, slices=(item,))


def _sparse_queries(length: int, config: SchedulerConfig) -> int:
    size = config.block_size
    queries = min(max(NUM_QUERIES, PAIRS // length), config.prefill_chunk_len, length)
    return max(NUM_QUERIES, queries // size * size)
