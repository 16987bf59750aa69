"""Build a Qwen2 model in transformers, switch its RoPE base, run its layers for training.

Attention is causal SDPA without any mask: a mask would take 69 GB at 262,144 tokens, leave the
fast kernels, and be silently wrong above 65,536 tokens in some of them (pytorch#162588).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

ATTENTION_NAME = "longspan_causal"
INIT_STD = 0.02
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
log = logging.getLogger(__name__)

RunLayer = Callable[[torch.nn.Module, Tensor, Tensor, Tensor], Tensor]


def causal_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Attend from query [B, H, Q, D] to key, value [B, K, S, D]: ([B, Q, H, D], None); no mask.

    With Q < S the queries are the last Q positions (a question after a cached document).
    """
    if attention_mask is not None:
        raise ValueError("longspan_causal takes no attention mask: use one document per row")
    groups = query.shape[1] // key.shape[1]
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.shape[2] != key.shape[2]:
        return _suffix_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _suffix_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attend from the last Q positions to all S keys, explicitly in fp32: [B, H, Q, D]."""
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * q_len, dim).float()
    scores = grouped @ key.float().transpose(-1, -2) * (scale or dim**-0.5)
    positions = torch.arange(k_len, device=key.device)
    last = positions[k_len - q_len :].repeat(heads // kv_heads)
    scores = scores.masked_fill(positions[None, :] > last[:, None], float("-inf"))
    out = scores.softmax(-1) @ value.float()
    return out.reshape(batch, heads, q_len, dim).to(value.dtype)


AttentionInterface.register(ATTENTION_NAME, causal_attention)


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


def set_rope(model: Qwen2ForCausalLM, rope_theta: float, max_positions: int) -> None:
    """Switch the RoPE base; ``config.rope_theta = x`` alone is ignored by transformers 5."""
    config = model.config
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(rope_theta)}
    config.max_position_embeddings = max_positions
    device = model.model.embed_tokens.weight.device
    rotary = Qwen2RotaryEmbedding(config=config).to(device)
    dim = rotary.inv_freq.numel() * 2
    expected = rope_theta ** (-2.0 / dim)
    assert abs(rotary.inv_freq[1].item() / expected - 1) < 1e-4, "the RoPE base did not change"
    model.model.rotary_emb = rotary


def rope_tables(model: Qwen2ForCausalLM, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions [start, stop), fp32, each [1, stop - start, D]."""
    device = model.model.embed_tokens.weight.device
    positions = torch.arange(start, stop, device=device)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1, device=device), positions)
    return cos, sin


def run_layer(layer: torch.nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run one decoder layer over whole rows: hidden [B, T, M] -> [B, T, M]."""
    out = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
    return out[0] if isinstance(out, tuple) else out


def compiled_run_layer() -> RunLayer:
    """Return ``run_layer``, compiled once per shape and shared by all layers."""
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.accumulated_cache_size_limit = 512
    return torch.compile(run_layer, dynamic=False)


def hidden_states(
    model: Qwen2ForCausalLM, ids: Tensor, run: RunLayer = run_layer,
    dtype: torch.dtype = torch.float32, recompute: bool = False,
) -> Tensor:
    """Compute the final normed hidden states of whole rows: ids [B, T] -> [B, T, M].

    ``dtype`` is the residual stream's; ``recompute`` trades time for memory (checkpointing).
    """
    hidden = model.model.embed_tokens(ids).to(dtype)
    cos, sin = rope_tables(model, 0, ids.shape[1])
    for layer in model.model.layers:
        if recompute:
            hidden = checkpoint(run, layer, hidden, cos, sin, use_reentrant=False)
        else:
            hidden = run(layer, hidden, cos, sin)
    return model.model.norm(hidden).to(dtype)


def choose_backend(shape: tuple[int, int], num_heads: int, head_dim: int) -> list[SDPBackend]:
    """Choose the faster of cuDNN and flash SDPA, forward and backward, at rows x length."""
    timings: list[tuple[float, SDPBackend]] = []
    for backend in BACKENDS:
        try:
            timings.append((_time_attention(backend, shape, num_heads, head_dim), backend))
        except RuntimeError as error:
            log.warning("%s unusable: %s", backend, str(error)[:200])
    timings.sort(key=lambda pair: pair[0])
    log.info("attention at %s: %s", shape, [(str(b), round(t, 2)) for t, b in timings])
    return [b for _, b in timings] or [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _time_attention(
    backend: SDPBackend, shape: tuple[int, int], num_heads: int, head_dim: int
) -> float:
    rows, length = shape
    size = (rows, num_heads, length, head_dim)
    q, k, v = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with sdpa_kernel(backend):
        for measured in (False, True):
            if measured:
                begin.record()
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.backward(torch.ones_like(out))
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def use_backends(backends: list[SDPBackend]) -> None:
    """Enable exactly these SDPA backends for the process (read when a graph is traced)."""
    torch.backends.cuda.enable_cudnn_sdp(SDPBackend.CUDNN_ATTENTION in backends)
    torch.backends.cuda.enable_flash_sdp(SDPBackend.FLASH_ATTENTION in backends)
    torch.backends.cuda.enable_mem_efficient_sdp(SDPBackend.EFFICIENT_ATTENTION in backends)
    torch.backends.cuda.enable_math_sdp(SDPBackend.MATH in backends)
