"""The report's own models at their real scale: Qwen2.5-7B-1M and 14B-1M from Qwen2.5's bases.

Lengths, RoPE bases and the 75/25 mixture are the report's (section 3). Tokens, rates and batch
sizes are not published; ours are of the size that ProLong names (arXiv 2410.02660: 20 billion
tokens at 65,536 and at 524,288, 4 million a step, 1e-5).
"""

from __future__ import annotations

from longspan.config import ModelConfig
from longspan.recipes.recipe import Extension
from longspan.train.phases import LADDER, Phase, short_length, shorter_lengths

BILLION = 10**9
TOKENS = {32_768: 20 * BILLION, 65_536: 10 * BILLION, 131_072: 10 * BILLION, 262_144: 10 * BILLION}
TOKENS_PER_STEP = 1 << 22


def qwen2_5_7b_1m() -> Extension:
    """Return Qwen2.5-7B's extension from 4,096 to 262,144 tokens."""
    return _extension("qwen2.5-7b-1m", _config(
        hidden_size=3584, intermediate_size=18_944, num_layers=28, num_heads=28, num_kv_heads=4),
        num_gpus=64)


def qwen2_5_14b_1m() -> Extension:
    """Return Qwen2.5-14B's, likewise."""
    return _extension("qwen2.5-14b-1m", _config(
        hidden_size=5120, intermediate_size=13_824, num_layers=48, num_heads=40, num_kv_heads=8),
        num_gpus=128)


def _config(
    *, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int
) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen2ForCausalLM", vocab_size=152_064, hidden_size=hidden_size,
        intermediate_size=intermediate_size, num_layers=num_layers, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=128, rms_norm_eps=1e-5, rope_theta=1e4,
        max_position_embeddings=4096, tie_word_embeddings=False, attention_bias=True, qk_norm=False)


def _extension(name: str, config: ModelConfig, num_gpus: int) -> Extension:
    phases = []
    for length, base in LADDER[1:]:
        is_mixed = length > LADDER[1][0]
        phases.append(Phase(
            name=short_length(length), seq_len=length, rope_theta=base, num_tokens=TOKENS[length],
            learning_rate=1e-5, tokens_per_step=TOKENS_PER_STEP,
            shorter=shorter_lengths(length, LADDER[1][0]) if is_mixed else (),
            full_share=0.75 if is_mixed else 1.0))
    return Extension(name=name, config=config, phases=tuple(phases), num_gpus=num_gpus,
                     context_parallel=8)
