"""Memory plans of quantised weights: what fits which card, and what disagrees with a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longspan.bench.shapes import Shape
from longspan.config import EngineConfig, ModelConfig, Quantization
from longspan.engine.device.memory import DeviceMemory
from longspan.engine.resolve import resolve_forms
from longspan.engine.setup.cache_key import cache_key
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.errors import LongspanError
from longspan.quantization import CheckpointQuantization, Method
from longspan.units import GIB
from longspan.weight_form import PLAIN_FORMS, FormKind, WeightForm, WeightForms
from longspan.weight_sizes import routed_bytes, scratch_bytes, weights_bytes

SHAPES = ("qwen2.5-7b", "qwen2.5-14b", "qwen3-30b-a3b", "nano")
H200_GIB = 139.2
"""Free memory of an H200."""


def plan(name: str, quantization: Quantization | None, gib: float) -> ResolvedEngine:
    shape, size = Shape.make(name), int(gib * GIB)
    return ResolvedEngine.of(
        shape.model, EngineConfig(model=name, device="cuda", weights="random",
                                  quantization=quantization, memory_gib=gib if gib < 24 else None),
        path=Path(name), plan=shape.plan, must_fit=False,
        device=DeviceMemory(total_bytes=size, free_bytes=size))


def test_cards_hold_more_with_quantised_weights() -> None:
    """A card of 24 GB reads a quarter of a million tokens with the 7B; an H200 a million with 30B
    parameters, fp8 weights and a cache of bf16."""
    small = [plan("qwen2.5-7b", quantization, 22).memory for quantization in (None, "fp8", "int4")]
    lengths = [memory.fitting_len for memory in small]
    assert lengths == sorted(lengths) and lengths[2] >= 240_000 > lengths[0]
    assert small[2].weights_bytes < 5.6 * GIB
    assert plan("qwen3-30b-a3b", None, H200_GIB).memory.fitting_len < 1_000_000
    assert plan("qwen3-30b-a3b", "fp8", H200_GIB).memory.fitting_len >= 1_010_000


@pytest.mark.parametrize("name", SHAPES)
def test_plain_weights_are_as_many_as_before(name: str) -> None:
    model = Shape.make(name).model
    assert weights_bytes(model, PLAIN_FORMS, 2) == 2 * model.num_parameters
    assert routed_bytes(model, PLAIN_FORMS, 2) == 2 * model.num_routed_parameters
    assert scratch_bytes(model, PLAIN_FORMS, 2, "cuda") == 0


def test_experts_are_made_plain_together_where_no_product_reads_them() -> None:
    model = Shape.make("qwen3-30b-a3b").model
    experts = 128 * 3 * 2_048 * 768 * 2
    cases: dict[FormKind, int] = {
        "fp8-rows": 2_048 * 5_120 * 2, "fp8-blocks": experts, "int4": experts}
    for kind, expected in cases.items():
        forms = WeightForms(WeightForm(kind, 128))
        assert scratch_bytes(model, forms, 2, "cuda") == expected
    assert scratch_bytes(model, forms, 2, "cpu") == 2_048 * 5_120 * 2


def test_modules_that_stay_plain_count_as_such() -> None:
    model = Shape.make("qwen2.5-7b").model
    some = WeightForms(WeightForm("fp8-rows"), ("model.layers.0", "down_proj"))
    every = WeightForms(WeightForm("fp8-rows"))
    difference = weights_bytes(model, some, 2) - weights_bytes(model, every, 2)
    down = 3_584 * 18_944 - 4 * 3_584  # a byte a number more, and no scales
    rest = 3_584 * (4_608 + 3_584 + 2 * 18_944) - 4 * (4_608 + 3_584 + 2 * 18_944)
    assert difference == 28 * down + rest


def quantised(method: Method, kind: FormKind) -> ModelConfig:
    return replace(Shape.make("qwen2.5-7b").model, quantization=CheckpointQuantization(
        method=method, form=WeightForm(kind, 128)))


def test_a_quantised_checkpoint_is_not_quantised_again() -> None:
    asked = EngineConfig(model="x", quantization="fp8")
    assert resolve_forms(asked, quantised("fp8", "fp8-blocks")).form.kind == "fp8-blocks"
    assert resolve_forms(EngineConfig(model="x"), quantised("awq", "int4")).form.kind == "int4"
    with pytest.raises(LongspanError) as error:
        resolve_forms(asked, quantised("awq", "int4"))
    assert str(error.value) == (
        "quantization 'fp8': the checkpoint's weights are quantised already (awq, int4 in groups); "
        "leave quantization out")


def test_blocks_of_other_weights_have_another_key() -> None:
    model = Shape.make("nano").model
    keys = {cache_key(Path("x"), model, EngineConfig(
        model="x", device="cpu", dtype="float32", quantization=quantization), dca=None, plan=None)
        for quantization in (None, "fp8", "int4")}
    assert len(keys) == 3
