"""Build a Qwen2 model in transformers, switch RoPE bases, run any family's layers for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3ForCausalLM

from longspan.config import ModelConfig
from longspan.train.attention import ATTENTION_NAME
from longspan.train.world import ContextGroup

INIT_STD = 0.02

CausalLM: TypeAlias = Qwen2ForCausalLM | Qwen3ForCausalLM | LlamaForCausalLM
"""What is trained: embedding, layers of one shape, a norm, a head that may be the embedding."""
RunLayer = Callable[[torch.nn.Module, Tensor, Tensor, Tensor, ContextGroup | None], Tensor]


def build_model(
    *, vocab_size: int, num_layers: int = 6, hidden_size: int = 512, num_heads: int = 4,
    num_kv_heads: int = 2, intermediate_size: int = 896, seed: int = 0,
) -> Qwen2ForCausalLM:
    """Make a fresh fp32 Qwen2 model with tied embeddings; o and down projections start smaller."""
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=num_layers, num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads, rms_norm_eps=1e-6, tie_word_embeddings=True,
        max_position_embeddings=4096, initializer_range=INIT_STD, use_sliding_window=False,
        attention_dropout=0.0, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    config._attn_implementation = ATTENTION_NAME
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    std = INIT_STD / (2 * num_layers) ** 0.5
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.normal_(0.0, std)
            layer.mlp.down_proj.weight.normal_(0.0, std)
    return model


def model_config(model: CausalLM) -> ModelConfig:
    """Return the model's sizes."""
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__],
           "head_dim": head_dim(model)}
    return ModelConfig.from_hf(raw, "the model's config")


def head_dim(model: CausalLM) -> int:
    """Return the size of a head."""
    return int(model.model.layers[0].self_attn.head_dim)


def set_rope(model: CausalLM, rope_theta: float, max_positions: int) -> None:
    """Switch the RoPE base, and keep what else the model's frequencies are made of.

    ``config.rope_theta = x`` alone is ignored by transformers 5.
    """
    config = model.config
    parameters: dict[str, Any] = {**(config.rope_parameters or {}), "rope_theta": float(rope_theta)}
    config.rope_parameters = parameters
    config.max_position_embeddings = max_positions
    device = model.model.embed_tokens.weight.device
    rotary = type(model.model.rotary_emb)(config=config).to(device)
    # The linear kind of scaling divides the fastest frequencies too.
    divisor = parameters["factor"] if parameters["rope_type"] == "linear" else 1.0
    expected = rope_theta ** (-1.0 / rotary.inv_freq.numel()) / divisor
    actual = rotary.inv_freq[1].item()
    assert abs(actual / expected - 1) < 1e-4, "the RoPE base did not change"
    model.model.rotary_emb = rotary


def rope_tables(model: CausalLM, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions [T], fp32, each [1, T, D]."""
    cos, sin = model.model.rotary_emb(torch.zeros(1, device=positions.device), positions[None])
    return cos, sin


def run_layer(
    layer: torch.nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor,
    context: ContextGroup | None = None,
) -> Tensor:
    """Run one decoder layer over whole rows: hidden [B, T, M] -> [B, T, M]."""
    out = layer(hidden, attention_mask=None, position_embeddings=(cos, sin), context=context)
    return out[0] if isinstance(out, tuple) else out


def compiled_run_layer() -> RunLayer:
    """Return ``run_layer``, compiled once per shape and shared by all layers."""
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.accumulated_cache_size_limit = 512
    return torch.compile(run_layer, dynamic=False)


def hidden_states(
    model: CausalLM, ids: Tensor, run: RunLayer = run_layer, dtype: torch.dtype = torch.float32,
    recompute: bool = False, context: ContextGroup | None = None,
) -> Tensor:
    """Compute the final normed hidden states of whole rows: ids [B, T] -> [B, T, M].

    Args:
        dtype: the residual stream's.
        recompute: trade time for memory (activation checkpointing).
        context: the processes that share the rows; ids are then this one's places of them.
    """
    length = ids.shape[1] * (context.size if context else 1)
    positions = (context or ContextGroup()).places(length, ids.device)
    hidden = model.model.embed_tokens(ids).to(dtype)
    cos, sin = rope_tables(model, positions)
    for layer in model.model.layers:
        if recompute:
            hidden = checkpoint(run, layer, hidden, cos, sin, context, use_reentrant=False)
        else:
            hidden = run(layer, hidden, cos, sin, context)
    return model.model.norm(hidden).to(dtype)
