"""Prefill chunks and requests follow the memory and the wanted length."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from longspan.bench.shapes import Shape
from longspan.config import DcaConfig, EngineConfig
from longspan.engine.device.memory import DeviceMemory
from longspan.engine.setup.step_sizes import ChosenSizes, StepSizes, choose_sizes
from longspan.errors import NotEnoughMemoryError
from longspan.units import GIB

SEVEN = Shape.make("qwen2.5-7b").model
CARDS = {"24 GB": 23.2, "40 GB": 39.0, "48 GB": 47.0, "80 GB": 79.0, "H200": 139.2}
"""Free memory of an idle card, GiB."""


def choose(free_gib: float, *, is_sparse: bool = True, **options: Any) -> ChosenSizes:
    config = EngineConfig(**{"model": "m", "device": "cuda", "dtype": "bfloat16", **options})
    free = int(free_gib * GIB)
    return choose_sizes(SEVEN, config, means=is_sparse, is_sparse=is_sparse,
                        device=DeviceMemory(total_bytes=free + GIB, free_bytes=free))


def sizes(chosen: ChosenSizes) -> tuple[int | None, int | None]:
    return chosen.config.prefill_chunk_len, chosen.config.max_num_requests


def holds(chosen: ChosenSizes, num_tokens: int) -> bool:
    return chosen.memory.num_blocks * chosen.memory.block_size >= num_tokens


def test_a_large_card_has_the_longest_chunks_and_two_contexts() -> None:
    """One request takes chunks of half a DCA chunk; a server's second long prompt is worth a step
    down."""
    one, server = choose(139.2, max_num_requests=1), choose(139.2)
    assert sizes(one) == (126_976, 1) and not one.reason
    assert sizes(server) == (63_488, 64) and holds(server, 2 * 1_010_000)
    assert "126,976 and max_num_requests 64 would leave room for 1,9" in server.reason
    assert "2 x 1,010,000 are wanted" in server.reason


def test_a_million_tokens_on_80_gb() -> None:
    for length in (None, 1_000_000):
        chosen = choose(79.0, max_model_len=length)
        assert chosen.memory.max_model_len == (length or 1_010_000)
        assert holds(chosen, chosen.memory.max_model_len) and "are wanted" in chosen.reason


def test_a_small_card_keeps_its_memory_for_the_context() -> None:
    """With chunks of 32,768 and 64 requests it would be 17,408 tokens."""
    chosen = choose(CARDS["24 GB"])
    assert 85_000 < chosen.memory.max_model_len < 92_000
    assert "the checkpoint's claim, do not fit" in chosen.reason
    assert choose(CARDS["24 GB"], max_model_len=105_000).memory.max_model_len == 105_000


@pytest.mark.parametrize("free_gib", CARDS.values(), ids=CARDS)
def test_what_is_asked_for_is_given_if_any_setting_allows_it(free_gib: float) -> None:
    fitting = choose(free_gib).memory.fitting_len
    assert choose(free_gib, max_model_len=fitting).memory.missing_bytes == 0
    with pytest.raises(NotEnoughMemoryError) as error:
        choose(free_gib, max_model_len=fitting + 128)
    told = re.search(r"lower max_model_len to (\d+), which fits with prefill_chunk_len ([\d,]+) "
                     r"and max_num_requests (\d+)", str(error.value))
    assert told and int(told[1]) == fitting and "\n" not in str(error.value)
    named = choose(free_gib, max_model_len=fitting, max_num_requests=int(told[3]),
                   prefill_chunk_len=int(told[2].replace(",", "")))
    assert named.memory.missing_bytes == 0


@pytest.mark.parametrize("free_gib", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("length", [None, 4_096, 50_000, 100_000])
def test_every_plan_keeps_to_its_budget(free_gib: float, length: int | None) -> None:
    memory = choose(free_gib, max_model_len=length).memory
    used = memory.weights_bytes + memory.workspace_bytes + memory.kv_bytes
    assert used <= memory.budget_bytes < free_gib * GIB
    assert memory.num_blocks * memory.block_size >= memory.max_model_len


def test_more_memory_is_never_worse() -> None:
    lengths = [choose(free).memory.max_model_len for free in (17, 18, 20, 30, 50, 70, 90, 139)]
    assert lengths == sorted(lengths) and lengths[-1] == 1_010_000


def test_sizes_that_were_asked_for_stay() -> None:
    chosen = choose(23.2, prefill_chunk_len=32_768, max_num_requests=64)
    assert sizes(chosen) == (32_768, 64) and 10_000 < chosen.memory.max_model_len < 25_000
    assert sizes(choose(23.2, prefill_chunk_len=2_048)) == (2_048, 16)
    assert sizes(choose(23.2, max_num_requests=500))[1] == 500
    with pytest.raises(NotEnoughMemoryError, match=r"leave prefill_chunk_len and "
                       r"max_num_requests out: it fits with prefill_chunk_len 4,096 and"):
        choose(23.2, prefill_chunk_len=32_768, max_model_len=85_000)


def test_long_chunks_are_for_selections_and_long_contexts() -> None:
    assert sizes(choose(139.2, is_sparse=False)) == (31_744, 64)
    assert sizes(choose(139.2, max_model_len=32_768)) == (32_768, 64)
    assert sizes(choose(139.2, max_model_len=40_000)) == (65_536, 64)
    assert sizes(choose(139.2, max_model_len=131_072)) == (131_072, 64)
    assert sizes(choose(139.2, device="cpu")) == (16_384, 64)
    assert sizes(choose(139.2, device="cpu", block_size=96)) == (170 * 96, 64)


@pytest.mark.parametrize(("chunk_size", "local_size", "expected"), [
    (262_144, 8_192, 126_976), (131_072, 4_096, 126_976), (32_768, 1_024, 126_976),
    (262_000, 8_000, 131_072)])
def test_chunks_end_where_the_chunks_of_dca_do(
    chunk_size: int, local_size: int, expected: int,
) -> None:
    """The released forms, what is derived for 32,768 tokens; where that cannot be, as ever."""
    dca = DcaConfig(chunk_size=chunk_size, local_size=local_size)
    model = replace(SEVEN, dca=dca)
    free = DeviceMemory(total_bytes=139 * GIB, free_bytes=139 * GIB)
    for length in (1_000_000, dca.dca_chunk_len):
        config = EngineConfig(model="m", device="cuda", dtype="bfloat16", max_num_requests=1,
                              max_model_len=length)
        chosen = choose_sizes(model, config, means=True, is_sparse=True, device=free)
        chunk = chosen.config.prefill_chunk_len
        assert chunk is not None
        assert chunk == expected if length == 1_000_000 else chunk & (chunk - 1) == 0


def test_what_lacks_is_told_where_nothing_has_to_fit() -> None:
    chosen = choose_sizes(
        SEVEN, EngineConfig(model="m", device="cuda", dtype="bfloat16", max_model_len=1_000_000),
        means=True, is_sparse=True, must_fit=False,
        device=DeviceMemory(total_bytes=24 * GIB, free_bytes=23 * GIB))
    assert chosen.memory.missing_bytes > 40 * GIB and chosen.memory.fitting_len > 100_000
    assert chosen.reason == "what was asked for fits under no setting"


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(NotEnoughMemoryError, match="needs 1.* a device with more memory") as error:
        choose(10)
    assert "max_model_len" not in str(error.value)


def test_settings_are_named() -> None:
    assert str(StepSizes(131_072, 64)) == "prefill_chunk_len 131,072 and max_num_requests 64"
