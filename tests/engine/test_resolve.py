"""Decisions from configuration and checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longspan.config import DcaConfig, EngineConfig, ModelConfig, Quantization
from longspan.dca_config import derive_dca
from longspan.engine.resolve import (
    check_tiles,
    check_window,
    extend_window,
    resolve_attention,
    resolve_config,
    resolve_kv_dtype,
    resolve_positions,
    resolve_quantization,
)
from longspan.errors import LongspanError
from longspan.expert_config import ExpertConfig
from longspan.rope_config import RopeScaling
from tests.doubles import MODEL

DCA = DcaConfig(chunk_size=64, local_size=8, original_max_position_embeddings=32)


def test_device_decides_the_defaults() -> None:
    cpu = resolve_config(EngineConfig(model="m"), has_cuda=False)
    gpu = resolve_config(EngineConfig(model="m"), has_cuda=True)
    assert (cpu.device, cpu.dtype) == ("cpu", "float32")
    assert (gpu.device, gpu.dtype) == ("cuda", "bfloat16")
    assert (cpu.step_budget_s, gpu.step_budget_s) == (1.0, 0.1)


def test_choices_are_kept() -> None:
    asked = EngineConfig(model="m", device="cpu", dtype="bfloat16", block_size=64,
                         prefill_chunk_len=128)
    resolved = resolve_config(asked, has_cuda=True)
    assert (resolved.device, resolved.dtype, resolved.prefill_chunk_len) == (
        "cpu", "bfloat16", 128)


@pytest.mark.parametrize(("fields", "message"), [
    ({"device": "tpu"}, "use cpu or cuda"), ({"device": "cpu:1"}, "use cpu or cuda"),
    ({"device": "cuda:x"}, "use cpu or cuda"), ({"device": "cuda:1"}, "no CUDA GPU"),
    ({"device": "cuda"}, "no CUDA GPU"),
    ({"dtype": "int8"}, "use float32 or bfloat16"),
])
def test_impossible_choices_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        resolve_config(EngineConfig(model="m", **fields), has_cuda=False)


def test_positions() -> None:
    plain, dca = ModelConfig(**MODEL), ModelConfig(**MODEL, dca=DCA)
    assert resolve_positions("auto", plain) is None
    assert resolve_positions("auto", dca) == resolve_positions("dca+yarn", dca) == DCA
    assert resolve_positions("rope", dca) is None
    assert resolve_positions("dca", dca) == DcaConfig(chunk_size=64, local_size=8)


def test_positions_without_the_checkpoint_facts_are_refused() -> None:
    without_length = ModelConfig(**MODEL, dca=DcaConfig(chunk_size=64, local_size=8))
    with pytest.raises(LongspanError, match="original_max_position_embeddings"):
        resolve_positions("dca+yarn", without_length)
    yarn = ModelConfig(**MODEL, rope_scaling=RopeScaling(kind="yarn", factor=4.0))
    assert resolve_positions("dca", yarn) is not None
    with pytest.raises(LongspanError, match="has the YaRN temperature in it; use positions 'dca'"):
        resolve_positions("dca+yarn", yarn)


def test_dca_for_a_checkpoint_without() -> None:
    """No position beyond the trained window; DCA chunks of whole tiles."""
    plain = ModelConfig(**{**MODEL, "max_position_embeddings": 131_072})
    derived = resolve_positions("dca+yarn", plain)
    assert derived == DcaConfig(chunk_size=131_072, local_size=4_096,
                                original_max_position_embeddings=131_072)
    assert resolve_positions("dca", plain) == replace(derived, original_max_position_embeddings=0)
    assert resolve_positions("auto", plain) is resolve_positions("rope", plain) is None
    long = extend_window("dca", plain)
    assert long.max_position_embeddings == 4 * 131_072 and long.sparse_threshold == 126_976
    assert extend_window("auto", plain) is plain and extend_window("rope", plain) is plain
    released = ModelConfig(**MODEL, dca=DCA)
    assert extend_window("dca", released) is released


@pytest.mark.parametrize("window", [2, 33, 100, 127, 128, 4_096, 32_768, 131_072, 1_048_576])
def test_derived_dca_of_any_window(window: int) -> None:
    dca = derive_dca(window)
    assert dca.chunk_size == window and 0 < dca.local_size < window
    assert dca.local_size >= window // 32 and (window < 256 or dca.dca_chunk_len % 128 == 0)


@pytest.mark.parametrize(("mode", "prompt_len", "has_plan", "has_dca", "expected"), [
    ("auto", 101, True, False, True),
    ("auto", 101, False, True, True),
    ("auto", 101, False, False, False),
    ("auto", 100, True, True, False),
    ("sparse", 1, False, False, True),
    ("dense", 101, True, True, False),
])
def test_attention(
    mode: Any, prompt_len: int, has_plan: bool, has_dca: bool, expected: bool,
) -> None:
    assert resolve_attention(
        mode, prompt_len, threshold=100, has_plan=has_plan, has_dca=has_dca) is expected


def test_tiles_must_lie_in_one_dca_chunk() -> None:
    dca = DcaConfig(chunk_size=1000, local_size=200)
    check_tiles(dca, block_size=16, max_model_len=4000)
    check_tiles(dca, block_size=128, max_model_len=800)
    check_tiles(None, block_size=128, max_model_len=4000)
    with pytest.raises(LongspanError, match="beyond 800 tokens .* divides them, not 128"):
        check_tiles(dca, block_size=128, max_model_len=801)


def test_dynamic_rope_ends_at_the_window() -> None:
    model = ModelConfig(**MODEL, rope_scaling=RopeScaling(kind="dynamic", factor=2.0))
    check_window(model, None, max_model_len=64)
    check_window(model, DCA, max_model_len=65)
    check_window(ModelConfig(**MODEL), None, max_model_len=65)
    with pytest.raises(LongspanError, match="max_model_len 65 is beyond the 64 tokens"):
        check_window(model, None, max_model_len=65)


LARGE = ModelConfig(**{**MODEL, "vocab_size": 100_000, "hidden_size": 4_096})
"""1.5 GiB of embedding in fp32."""


@pytest.mark.parametrize(("model", "fields", "device", "has_int8", "expected"), [
    (LARGE, {}, "cpu", True, "int8"),
    (LARGE, {}, "cpu", False, None),
    (LARGE, {}, "cuda", True, None),
    (LARGE, {"dtype": "float32"}, "cpu", True, None),
    (LARGE, {"quantization": "none"}, "cpu", True, "none"),
    (LARGE, {"quantization": "fp8"}, "cpu", True, "fp8"),
    (replace(LARGE, experts=ExpertConfig(
        num_experts=4, num_chosen=2, expert_size=64, is_normed=True)), {}, "cpu", True, None),
    (ModelConfig(**MODEL), {}, "cpu", True, None),
    (ModelConfig(**MODEL), {"quantization": "int8"}, "cpu", True, "int8"),
])
def test_large_models_are_int8_on_cpus_unless_somebody_says(
    model: ModelConfig, fields: dict[str, Any], device: str, has_int8: bool, expected: str | None,
) -> None:
    asked = EngineConfig(model="m", **fields)
    assert resolve_quantization(asked, model, device=device, has_int8=has_int8) == expected


@pytest.mark.parametrize(("fields", "expected"), [
    ({"quantization": "int8"}, "bfloat16"), ({"quantization": "int4"}, "bfloat16"), ({}, None),
    ({"quantization": "int8", "kv_dtype": "float32"}, None), ({"kv_dtype": "bfloat16"}, "bfloat16"),
    ({"quantization": "int8", "kv_dtype": "int8"}, "int8"), ({"dtype": "bfloat16"}, None),
    ({"dtype": "bfloat16", "kv_dtype": "bfloat16"}, None),
    ({"quantization": "int4", "device": "cuda", "dtype": "bfloat16"}, None),
])
def test_keys_and_values_are_bf16_beside_quantised_weights_on_cpus(
    fields: dict[str, Any], expected: str | None,
) -> None:
    asked = EngineConfig(**{"model": "m", "device": "cpu", **fields})
    config = resolve_config(asked, has_cuda=True)
    assert resolve_kv_dtype(config) == expected


@pytest.mark.parametrize("fields", [
    {"dtype": "bfloat16", "kv_dtype": "float32"},
    {"device": "cuda", "dtype": "float32", "kv_dtype": "bfloat16"}])
def test_types_of_keys_that_no_kernel_reads_are_refused(fields: dict[str, Any]) -> None:
    asked = EngineConfig(**{"model": "m", "device": "cpu", **fields})
    config = resolve_config(asked, has_cuda=True)
    with pytest.raises(LongspanError, match=r"or int8 there; leave it out$"):
        resolve_kv_dtype(config)


@pytest.mark.parametrize(("quantization", "device", "has_int8", "message"), [
    ("int8", "cuda", True, "is for CPUs, and the device is cuda; use fp8"),
    ("int8", "cpu", False, "needs an x86 CPU with AVX2"),
    ("int4", "cpu", False, "int4 on a CPU needs an x86 CPU with AVX2"),
])
def test_formats_are_refused_where_they_cannot_be(
    quantization: Quantization, device: str, has_int8: bool, message: str,
) -> None:
    asked = EngineConfig(model="m", quantization=quantization)
    with pytest.raises(LongspanError, match=message):
        resolve_quantization(asked, ModelConfig(**MODEL), device=device, has_int8=has_int8)
