"""Block hashes of prompts: the same whoever works them out, and where it is done."""

from __future__ import annotations

import pytest

from longspan.engine import prefixes
from longspan.engine.prefixes import hash_prompt
from longspan.engine.scheduler import Scheduler, SchedulerConfig
from longspan.engine.wire import Add, Codec, ToScheduler, encode
from tests.doubles import make_request

CONFIG = SchedulerConfig(
    num_blocks=64, block_size=4, max_model_len=128, prefill_chunk_len=16, max_num_requests=4,
    dense_tail_len=6)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_request_may_come_with_its_hashes(
    sparse: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As from a front end: the scheduler then hashes nothing, and finds the same prefixes."""
    plain = make_request("a", range(70), max_tokens=2, sparse=sparse)
    scheduler = Scheduler(CONFIG)
    scheduler.add(plain)
    scheduler.schedule()
    assert len(plain.block_hashes) == 70 // 4
    made = make_request("b", range(70), max_tokens=2, sparse=sparse)
    hash_prompt(made, CONFIG)
    assert made.block_hashes == plain.block_hashes
    sent = Codec(ToScheduler).decode(encode(Add(made))).request

    def refuse(*args: object) -> None:
        raise AssertionError("hashed a second time")

    monkeypatch.setattr(prefixes, "extend_hashes", refuse)
    other = Scheduler(CONFIG)
    other.add(sent)
    assert other.schedule() is not None and sent.block_hashes == plain.block_hashes
