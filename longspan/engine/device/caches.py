"""KV caches of a pipeline stage, in the type that the engine keeps them in."""

from __future__ import annotations

import torch

from longspan.attention.cache import allocate_cache
from longspan.config import EngineConfig
from longspan.engine.device.memory import MemoryPlan
from longspan.model import TORCH_DTYPES, CausalLM
from longspan.ops.types import PagedKV


def allocate_caches(
    part: CausalLM, config: EngineConfig, memory: MemoryPlan, dtype: torch.dtype, *, means: bool,
) -> tuple[PagedKV, ...]:
    """Allocate the caches of a stage's layers, whose weights are loaded. A cache that ranks divide
    holds no means."""
    model, device, parts = part.config, config.device, config.kv_parts
    assert device is not None
    is_quantised = config.kv_dtype == "int8"
    sizes = {"block_size": memory.block_size // parts, "num_kv_heads": model.num_kv_heads,
             "head_dim": model.head_dim}
    caches = tuple(
        allocate_cache(num_blocks=memory.num_blocks, **sizes, dtype=dtype, device=device,
                       means=means and parts == 1,
                       k_gain=layer.key_gains() if is_quantised else None)
        for layer in part.decoder_layers())
    kept = TORCH_DTYPES.get(config.kv_dtype or "", dtype)
    if kept != dtype:
        caches = tuple(cache._replace(k=torch.empty_like(cache.k, dtype=kept),
                                      v=torch.empty_like(cache.v, dtype=kept)) for cache in caches)
    if not is_quantised or not device.startswith("cuda"):
        return caches
    longest = -(-memory.max_model_len // memory.block_size)
    shape = (longest, memory.block_size, model.num_kv_heads, model.head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    return tuple(cache._replace(k_scratch=k, v_scratch=v) for cache in caches)
