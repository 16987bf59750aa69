"""RoPE tables against fp64 and transformers' formula; the YaRN temperature's constants."""

from __future__ import annotations

import math

import pytest
import torch

from longspan.attention.rope import build_rotary, inverse_frequencies, yarn_temperature
from longspan.config import DcaConfig
from longspan.rope_config import RopeScaling
from tests.conftest import assert_close

RELEASED = DcaConfig(chunk_size=262_144, local_size=8_192,
                     original_max_position_embeddings=262_144)


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1e7), (64, 1e6), (80, 1e4)])
def test_inverse_frequencies(head_dim: int, theta: float) -> None:
    expected = torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)],
                            dtype=torch.float64)
    frequencies = inverse_frequencies(head_dim, theta)
    assert frequencies.dtype == torch.float32
    assert_close(frequencies, expected)


@pytest.mark.parametrize(("scaling", "block"), [
    (RopeScaling(kind="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    (RopeScaling(kind="llama3", factor=8.0),
     {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192}),
    (RopeScaling(kind="llama3", factor=32.0, low_freq_factor=2.0, high_freq_factor=8.0,
                 original_max_position_embeddings=4096),
     {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0,
      "original_max_position_embeddings": 4096}),
    (RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32_768),
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}),
    (RopeScaling(kind="yarn", factor=8.0, original_max_position_embeddings=4096, beta_fast=16.0,
                 beta_slow=2.0, truncate=False),
     {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096,
      "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
], ids=["linear", "llama3.1", "llama3-other", "yarn", "yarn-other"])
def test_scaled_frequencies_are_transformers_bit_for_bit(
    scaling: RopeScaling, block: dict[str, float | str]
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=131_072,
                         rope_parameters={"rope_theta": 5e5, **block})
    expected = LlamaRotaryEmbedding(config).inv_freq
    assert torch.equal(inverse_frequencies(128, 5e5, scaling), expected)
    assert not torch.equal(inverse_frequencies(128, 5e5), expected)
    rotary = build_rotary(head_dim=128, rope_theta=5e5, scaling=scaling, max_model_len=64, dca=None)
    assert torch.equal(rotary.inv_freq, expected)
    assert torch.equal(rotary.cos, (torch.arange(64).float()[:, None] * expected).cos())


def test_tables_are_transformers_fp32_tables() -> None:
    """Angles are products of an fp32 position and an fp32 frequency, as in Hugging Face models, so
    that long positions agree with what checkpoints were trained on."""
    rotary = build_rotary(head_dim=128, rope_theta=1e7, max_model_len=5000, dca=None)
    angles = torch.arange(5000).float()[:, None] * rotary.inv_freq
    assert torch.equal(rotary.cos, angles.cos()) and torch.equal(rotary.sin, angles.sin())
    exact = torch.arange(5000).double()[:, None] * inverse_frequencies(128, 1e7).double()
    assert (rotary.cos - exact.cos()).abs().max() < 1e-3
    assert (rotary.sin - exact.sin()).abs().max() < 1e-3


@pytest.mark.parametrize(("dca", "max_model_len", "num_rows", "stride", "clamp"), [
    (None, 4096, 4096, 4096, 4096),
    (DcaConfig(chunk_size=64, local_size=16), 40, 40, 48, 64),
    (DcaConfig(chunk_size=64, local_size=16), 65, 65, 48, 64),
    (DcaConfig(chunk_size=64, local_size=16), 4096, 65, 48, 64),
], ids=["plain", "short-dca", "one-beyond", "long-dca"])
def test_table_rows_and_geometry(
    dca: DcaConfig | None, max_model_len: int, num_rows: int, stride: int, clamp: int
) -> None:
    """A row for every rotated position: up to the clamp, or the longest context."""
    rotary = build_rotary(head_dim=16, rope_theta=1e4, max_model_len=max_model_len, dca=dca)
    assert rotary.cos.shape == rotary.sin.shape == (num_rows, 8)
    assert (rotary.stride, rotary.clamp) == (stride, clamp)


@pytest.mark.parametrize(("length", "temperature"), [
    (1, 1.0), (262_143, 1.0), (262_144, 1.0), (524_288, 1.0693), (1_000_000, 1.1339),
    (1_010_000, 1.1349)])
def test_yarn_constants_of_the_released_models(length: int, temperature: float) -> None:
    trained = RELEASED.original_max_position_embeddings
    assert yarn_temperature(length, trained) == pytest.approx(temperature, abs=5e-5)


def test_yarn_grows_with_the_length_and_needs_a_trained_length() -> None:
    assert yarn_temperature(262_145, 262_144) > 1.0
    assert yarn_temperature(10**6, 0) == 1.0
    assert yarn_temperature(32_768 * 4, 32_768) == pytest.approx(0.1 * math.log(4) + 1)
