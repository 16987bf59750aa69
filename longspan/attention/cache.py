"""Memory of one layer's KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.types import PagedKV


def allocate_cache(
    *, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    device: torch.device | str, means: bool, k_gain: Tensor | None = None,
) -> PagedKV:
    """Allocate one layer's KV cache, uninitialised: on CPUs memory is taken as blocks are written.

    Args:
        means: with each block's mean key and mean value, for plans with the mean correction.
        k_gain: keys and values are int8, with these gains (`longspan.ops.int8_kv`), [K, D].
    """
    def pair(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
        first, second = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        return first, second

    heads = num_kv_heads, head_dim
    kept = pair(dtype if k_gain is None else torch.int8, num_blocks, block_size, *heads)
    k_mean, v_mean = pair(dtype, num_blocks, *heads) if means else (None, None)
    if k_gain is None:
        return PagedKV(*kept, k_mean, v_mean)
    scales = pair(torch.float32, num_blocks, num_kv_heads, block_size)
    return PagedKV(*kept, k_mean, v_mean, *scales, k_gain.to(device=device, dtype=dtype))
