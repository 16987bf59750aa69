"""The first requests of an engine that serves: nobody asked for them, and the latency model learns
from them how fast the machine is. No torch."""

from __future__ import annotations

from array import array

from longspan.engine.loop import Loop
from longspan.engine.request import Request, SamplingParams
from longspan.engine.scheduler import Scheduler

COLD_LEN = 64
"""Tokens of a first prompt, whose time tells only how long compilers take."""
NUM_TOKENS = 8
"""Completion of each."""


def warm_up(scheduler: Scheduler, loop: Loop) -> None:
    """Compute a short prompt, and one of ``warm_up_len`` tokens in each way that prompts can take.
    """
    length = min(scheduler.config.warm_up_len, scheduler.config.longest_len - NUM_TOKENS)
    if length < 1:
        return
    kinds = (False,) if scheduler.config.sparse_above is None else (False, True)
    for number, sparse in enumerate(kinds):
        _compute(loop, number, min(COLD_LEN, length), sparse)
        _compute(loop, number + 2, length, sparse)
    scheduler.latency.reset()
    for number, sparse in enumerate(kinds):
        _compute(loop, number + 4, -(-length // 2), sparse)
        _compute(loop, number + 6, length, sparse)


def _compute(loop: Loop, number: int, prompt_len: int, sparse: bool) -> None:
    """A prompt that begins as no other one, the warm-up's included: nothing of it is cached."""
    request = Request(
        request_id=f"warm-up {number}", prompt_ids=array("i", [number, *[0] * (prompt_len - 1)]),
        params=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True), sparse=sparse)
    loop.add(request)
    while not loop.is_idle:
        loop.turn()
