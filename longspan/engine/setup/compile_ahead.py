"""Steps that a server computes before its first request only to compile kernels. No torch.

Kernels are compiled for sizes by powers of two, among them the context's: without these steps the
first long prompt would wait for the compiler in every other chunk, and with it all other requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from longspan.engine.control.scheduler import SchedulerConfig
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice

GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
NUM_QUERIES, TAIL_QUERIES = 512, 1_536
"""Queries of the shortest sparse step, enough to trigger every kernel; of a prompt's tail: routed
experts take them in tiles of other sizes."""
FEW_QUERIES = tuple(1 << bits for bits in range(8))
"""Queries of dense steps: up to a tile of them, as a prompt's incomplete last block has, are taken
by other kernels or split among programs."""
PAIRS = 1 << 31
"""Queries of a sparse step times its context: half of them have the scouts that a context of that
length asks for (`ops.geometry.num_scouts`), and a DCA chunk may end among them. Kernels that look
for the largest of many are compiled for their number."""
SHORT_LEN = 1_024
"""So few keys are not split among programs: other kernels write the result."""
FIRST_LEN = 32_768
"""Shortest context beside that which is worth a step: others are compiled for in a moment."""


def context_lens(config: SchedulerConfig) -> list[int]:
    """Return `SHORT_LEN`, `FIRST_LEN`, its doublings and the longest, in whole KV blocks."""
    size, longest = config.block_size, config.longest_len
    found, length = [min(SHORT_LEN, longest)], min(config.prefill_chunk_len, FIRST_LEN)
    while length < longest:
        found.append(length)
        length *= 2
    found.append(longest)
    whole = {length // size * size for length in found}
    return sorted(length for length in whole if length > NUM_QUERIES)


def compile_steps(
    config: SchedulerConfig, *, shares_rows: bool = False,
) -> Iterator[ScheduledBatch]:
    """Prefill steps at the end of ever longer contexts, dense and, where the engine has it, sparse.
    They write to blocks that no request has yet. The last ones sample a token that nobody gets.

    Args:
        shares_rows: ranks share rows of prefills, but not the few of a tail: those take kernels
            that no rank's part does.
    """
    lengths = context_lens(config)
    for number, length in enumerate(lengths):
        is_last = length == lengths[-1]
        for queries in _dense_queries(number, min(length, config.prefill_chunk_len)):
            yield _step(length, queries, config, False, samples=is_last)
        if config.sparse_above is not None:
            if shares_rows and min(length, config.prefill_chunk_len) > TAIL_QUERIES:
                yield _step(length, TAIL_QUERIES, config, True, samples=False)
            yield _step(length, _sparse_queries(length, config), config, True, samples=is_last)


def _dense_queries(number: int, most: int) -> list[int]:
    """Return the queries of the dense steps of a context, at most a prefill chunk: what depends on
    their number alone is compiled with the shortest two."""
    few = [FEW_QUERIES, (FEW_QUERIES[-1], TAIL_QUERIES), ()][min(number, 2)]
    return [min(queries, most) for queries in (*few, NUM_QUERIES)]


def _step(
    length: int, queries: int, config: SchedulerConfig, is_sparse: bool, *, samples: bool,
) -> ScheduledBatch:
    """One prefill chunk, the context's last ``queries`` tokens."""
    item = ScheduledSlice(
        request_id="compile-ahead", token_ids=array("i", [0] * queries),
        sampling=GREEDY if samples else None, cached_len=length - queries, sparse=is_sparse,
        prompt_len=length + (0 if samples else config.block_size),
        block_ids=range(length // config.block_size))
    return ScheduledBatch(step_id=0, slices=(item,))


def _sparse_queries(length: int, config: SchedulerConfig) -> int:
    size = config.block_size
    queries = min(max(NUM_QUERIES, PAIRS // length), config.prefill_chunk_len, length)
    return max(NUM_QUERIES, queries // size * size)
