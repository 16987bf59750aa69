"""Attention without masks, the RoPE switch, shared compiled layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2ForCausalLM

from longspan.train.attention import causal_attention
from longspan.train.model import build_model, compiled_run_layer, hidden_states, set_rope


def tiny() -> Qwen2ForCausalLM:
    return build_model(
        vocab_size=300, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1,
        intermediate_size=96)


@pytest.mark.parametrize("q_len", [40, 7, 1])
def test_attention_equals_sdpa(q_len: int) -> None:
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    out, _ = causal_attention(torch.nn.Identity(), q[:, :, -q_len:], k, v, None, scaling=0.3)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(out, full.transpose(1, 2)[:, -q_len:])


def test_a_mask_is_refused() -> None:
    x = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="no attention mask"):
        causal_attention(torch.nn.Identity(), x, x, x, torch.ones(8, 8))


def test_rope_switch_takes_effect() -> None:
    model = tiny()
    ids = torch.randint(0, 300, (1, 200))
    before = hidden_states(model, ids)
    set_rope(model, 1e7, 4096)
    inv_freq = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(inv_freq, 1e7 ** -(torch.arange(0, 32, 2) / 32.0))
    assert model.config.rope_parameters["rope_theta"] == 1e7
    assert (hidden_states(model, ids) - before).abs().max() > 1e-3


def test_output_projections_start_smaller() -> None:
    layer = tiny().model.layers[0]
    assert layer.self_attn.o_proj.weight.std() < 0.7 * layer.self_attn.q_proj.weight.std()
    assert layer.mlp.down_proj.weight.std() < 0.7 * layer.mlp.up_proj.weight.std()


def test_a_failed_compilation_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on without would be several times slower than what was asked for."""
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        hidden_states(tiny(), torch.zeros(1, 128, dtype=torch.int32), compiled_run_layer())
