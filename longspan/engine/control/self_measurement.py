"""An engine that serves measures itself before the first request: it computes prompts that nobody
asked for, and the latency model learns from them how fast the machine is. No torch."""

from __future__ import annotations

from array import array

from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.request import Request, SamplingParams

COLD_LEN = 64
"""Length of the first prompt, whose time tells only how long compilers take."""
NUM_TOKENS = 8
"""Length of each completion."""


def measure_itself(scheduler: Scheduler, loop: Loop) -> None:
    """Compute prompts of up to ``self_measurement_len`` tokens, and a sparse one where sparse
    prefill has kernels to prepare.

    The time of the sparse one is forgotten: in a chunk as short as this, most rows are dense. The
    planner measures the first real chunk a piece at a time.
    """
    config = scheduler.config
    room = config.longest_len - NUM_TOKENS
    length = min(config.self_measurement_len, room)
    if length < 1:
        return
    prompts = [(min(COLD_LEN, length), False)]
    if config.sparse_above is not None and config.warms_sparse:
        prompts.append((min(room, 2 * config.tail_len + length), True))
    num_cold = len(prompts)
    for number, (prompt_len, sparse) in enumerate([
            *prompts, (-(-length // 2), False), (length, False)]):
        _compute(loop, number, prompt_len, sparse=sparse)
        if number < num_cold:
            scheduler.latency.reset()
            scheduler.forecast = None


def _compute(loop: Loop, number: int, prompt_len: int, *, sparse: bool) -> None:
    """Compute a prompt whose first token no other one has, so that nothing of it is cached. Nor
    does it go to disk: the next start would read it, and measure nothing."""
    request = Request(
        request_id=f"self-measurement {number}",
        prompt_ids=array("i", [number, *[0] * (prompt_len - 1)]),
        params=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True), sparse=sparse,
        noted_len=prompt_len + NUM_TOKENS)
    loop.add(request)
    while not loop.is_idle:
        loop.turn()
