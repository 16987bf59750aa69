"""Whether ranks divide the KV cache: where memory needs it, or where it is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.bench.shapes import Shape
from longspan.config import EngineConfig
from longspan.engine.device.memory import DeviceMemory
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.setup.load import kv_label
from longspan.errors import LongspanError, NotEnoughMemoryError
from longspan.units import GIB

H200 = DeviceMemory(total_bytes=140 * GIB, free_bytes=139 * GIB)


def plan(
    shape: str, length: int | None, ranks: int, *, must_fit: bool = True, **options: Any,
) -> ResolvedEngine:
    model = replace(Shape.make(shape).model, max_position_embeddings=40_000_000)
    return ResolvedEngine.of(model, EngineConfig(**{
        "model": "x", "device": "cuda", "weights": "random", "context_parallel": ranks,
        "max_model_len": length, **options}), path=Path("x"), plan=None, device=H200,
        must_fit=must_fit)


def test_a_cache_is_divided_where_a_context_does_not_fit_whole() -> None:
    """A million tokens of the 14B shape take 180 GiB of keys and values."""
    assert not plan("qwen2.5-7b", 1_010_000, 2).config.divides_kv
    with pytest.raises(NotEnoughMemoryError):
        plan("qwen2.5-14b", 1_010_000, 1)
    found = plan("qwen2.5-14b", 1_010_000, 2)
    assert found.config.divides_kv and found.config.kv_parts == 2
    assert found.config.block_size == found.memory.block_size == 128
    assert kv_label(found.config) == "KV cache (1/2 a rank)"
    assert not found.memory.missing_bytes
    # as many tokens to a rank as one of them has of half the size, but for means
    whole = plan("qwen2.5-14b", 200_000, 2)
    assert not whole.config.divides_kv and kv_label(whole.config) == "KV cache"
    assert found.memory.kv_bytes_per_token <= whole.memory.kv_bytes_per_token / 2


def test_the_ranks_of_a_stage_divide_what_their_layers_need() -> None:
    """Two stages hold a million tokens of it whole, but not two millions."""
    whole, divided = (plan("qwen2.5-14b", length, 2, pipeline_parallel=2)
                      for length in (1_010_000, 2_000_000))
    assert not whole.config.divides_kv and divided.config.divides_kv
    assert kv_label(divided.config) == "KV cache (1/2 a rank)"
    alone = plan("qwen2.5-14b", 2_000_000, 2, divides_kv=True, must_fit=False).memory
    stage = divided.memory
    assert not stage.missing_bytes and alone.missing_bytes > 0
    assert stage.kv_bytes_per_token == pytest.approx(alone.kv_bytes_per_token * 25 / 48, rel=0.05)


def test_workspace_holds_what_is_collected() -> None:
    """Keys and values of one layer: twice, and what is on its way."""
    whole, divided = (plan("qwen2.5-7b", 500_000, 2, divides_kv=divides).memory
                      for divides in (False, True))
    layer = 500_000 * 2 * 4 * 128 * 2
    assert divided.workspace_bytes - whole.workspace_bytes == 2 * layer + layer // 2 + layer // 4


def test_the_longest_context_is_longer_with_more_ranks() -> None:
    lengths = [plan("qwen2.5-7b", None, ranks).memory.max_model_len for ranks in (1, 2, 4)]
    assert all(longer > 1.4 * shorter for shorter, longer in zip(
        lengths, lengths[1:], strict=False))


@pytest.mark.parametrize(("ranks", "options", "words"), [
    (1, {}, "there is one rank that shares rows"),
    (2, {"kv_dtype": "int8"}, "a KV cache in int8 is not divided"),
    (3, {}, "3 ranks cannot share blocks of 128 tokens equally"),
    (2, {"block_size": 16, "prefill_chunk_len": 1024}, "16 or more for each"),
])
def test_what_cannot_be_divided(ranks: int, options: dict[str, Any], words: str) -> None:
    """Refused where it is asked for, and never chosen."""
    with pytest.raises(LongspanError, match=words) as caught:
        plan("qwen2.5-7b", 100_000, ranks, divides_kv=True, **options)
    assert str(caught.value).startswith("divides_kv: ") and "\n" not in str(caught.value)
    found = plan("qwen2.5-7b", None, ranks, **options)
    assert not found.config.divides_kv and found.config.kv_parts == 1


def test_more_ranks_than_heads_select_nothing_for_sparse_prefill() -> None:
    """With dense attention every rank has rows to compute all the same."""
    with pytest.raises(LongspanError, match="context_parallel 5: .* there are 4; use 4 ranks"):
        plan("nano", 65_536, 5, attention="sparse", divides_kv=False)
    with pytest.raises(LongspanError, match="there are 2; use 2 ranks"):
        plan("nano", 65_536, 3, attention="sparse", tensor_parallel=2, divides_kv=False)
    for ranks, attention in ((4, "sparse"), (5, "dense")):
        found = plan("nano", 65_536, ranks, attention=attention, divides_kv=False)
        assert found.config.context_parallel == ranks
