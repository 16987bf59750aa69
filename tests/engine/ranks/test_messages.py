"""What ranks tell of themselves, and which differences end a group, by name."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from longspan.engine.ranks.messages import Facts, differences, least_memory

FACTS = Facts(
    host="one", device="cuda:0", total_bytes=100, free_bytes=90, versions={"longspan": "0.1"},
    checkpoint="0123456789", options={"dtype": None}, backend="nccl")


def other(**changes: Any) -> Facts:
    return msgspec.structs.replace(FACTS, **{"device": "cuda:1", **changes})


@pytest.mark.parametrize(("changes", "words"), [
    ({}, ""),
    ({"host": "two", "device": "cuda:0"}, ""),
    ({"versions": {"longspan": "0.2"}}, "rank 1 has longspan 0.2, rank 0 has 0.1"),
    ({"versions": {}}, "rank 1 has longspan none"),
    ({"checkpoint": "abcdefghij"}, r"rank 1 has another checkpoint than rank 0 \(abcdefgh, not 01"),
    ({"options": {"dtype": "float32"}}, "rank 1 was started with dtype 'float32', rank 0 w"),
    ({"device": "cpu", "backend": "gloo"}, "rank 1 computes on cpu, rank 0 on cuda:0"),
    ({"device": "cuda:0"}, "ranks 0 and 1 have the same GPU, cuda:0"),
    ({"backend": ""}, "rank 1: this PyTorch has no NCCL"),
    ({"device": "cpu", "backend": ""}, "rank 1: this PyTorch has no gloo"),
])
def test_differences_are_named(changes: dict[str, Any], words: str) -> None:
    found = differences([FACTS, other(**changes)])
    assert re.search(words, found) if words else not found, found


def test_the_smallest_device_counts_and_ranks_of_a_machine_share_its_memory() -> None:
    assert least_memory([FACTS, other(total_bytes=80, free_bytes=85)]) == (80, 85)
    here = msgspec.structs.replace(FACTS, device="cpu")
    there = other(device="cpu", host="two", total_bytes=60, free_bytes=30)
    assert least_memory([here, here, there]) == (50, 30)
