"""Our attention under transformers' models: parity tests and evaluation without the engine.

transformers hands over queries and keys that are already rotated at their true positions, and
keeps such keys in its own cache. Each call takes these rotations back, and runs the layer that
the engine runs, over a temporary paged cache. For parity and evaluation, not for speed: a decoded
token costs one pass over its context.
Source of the interface: transformers `AttentionInterface` and `AttentionMaskInterface`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longspan import ops
from longspan.attention.cache import allocate_cache
from longspan.attention.layer import DualChunkAttention
from longspan.attention.metadata import SequenceSlice, build_metadata
from longspan.attention.rope import build_rotary, inverse_frequencies
from longspan.attention.sparsity import SparsityPlan, needs_means
from longspan.config import ModelConfig
from longspan.errors import InvalidRequestError, LongspanError, MissingDependencyError
from longspan.ops.types import PagedKV, QueryRotary

BLOCK_SIZE = 128


def register(
    config: ModelConfig, *, plan: SparsityPlan | None = None, name: str = "longspan_dca"
) -> str:
    """Make `name` a value of transformers' ``attn_implementation``, and return it.

    Args:
        config: geometry and RoPE base; ``dca`` None means plain RoPE, and a `dca` whose
            ``original_max_position_embeddings`` is 0 means DCA without the YaRN temperature.
        plan: sparse prefill for contexts above ``config.sparse_threshold``; None: dense.

    Batches must be unpadded and consecutive: a mask with zeros raises `InvalidRequestError`.
    The temperature follows the context so far, as the engine's does when a prompt comes in one
    piece. Raises `MissingDependencyError` without transformers.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError:
        raise MissingDependencyError(
            "transformers is not installed: pip install transformers") from None
    if plan is not None:
        plan.check_fits(config.num_layers, config.num_heads)
    AttentionInterface.register(name, _HfAttention(config, plan))
    AttentionMaskInterface.register(name, _no_mask)
    return name


class _HfAttention:
    """The function that transformers calls once a layer and forward pass."""

    def __init__(self, config: ModelConfig, plan: SparsityPlan | None) -> None:
        self.config, self.plan = config, plan
        self.inv_freq = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling)
        self.rotary: QueryRotary | None = None
        self.layers: dict[int, DualChunkAttention] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None, **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend. query: [B, H, T, D]; key, value: [B, K, S, D]. Returns [B, T, H, D]."""
        context_len, query_len = key.shape[2], query.shape[2]
        if torch.is_grad_enabled() and query.requires_grad:
            raise LongspanError("longspan attention computes no gradients; use torch.no_grad()")
        if attention_mask is not None:
            raise InvalidRequestError("longspan attention takes no ready-made attention mask")
        positions = torch.arange(context_len, device=query.device)
        _check_positions(kwargs.get("position_ids"), positions[context_len - query_len :])
        layer = self._layer(int(module.layer_idx), context_len, query.device)  # type: ignore[arg-type]
        inv_freq = self.inv_freq.to(query.device)
        rows = [
            self._attend(layer, unrotate(q.transpose(0, 1), positions[-query_len:], inv_freq),
                         unrotate(k.transpose(0, 1), positions, inv_freq), v.transpose(0, 1))
            for q, k, v in zip(query, key, value, strict=True)
        ]
        return torch.stack(rows), None

    def _attend(self, layer: DualChunkAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend for one request. q: [T, H, D], k, v: [S, K, D], none rotated; returns
        [T, H, D]."""
        context_len, query_len = k.shape[0], q.shape[0]
        cached_len = context_len - query_len
        cache = self._filled_cache(layer.rotary, k[:cached_len], v[:cached_len], context_len)
        # One token after others is a decode step, whatever it is to the caller: never sparse.
        is_decode = query_len == 1 and cached_len > 0
        part = SequenceSlice(
            query_len=query_len, cached_len=cached_len,
            prompt_len=cached_len if is_decode else context_len,
            block_ids=range(cache.k.shape[0]),
            sparse=self.plan is not None and context_len > self.config.sparse_threshold,
        )
        metadata = build_metadata(
            [part], block_size=BLOCK_SIZE, head_dim=self.config.head_dim, dca=self.config.dca,
            device=q.device,
        )
        return layer(q, k[cached_len:], v[cached_len:], cache, metadata)

    def _filled_cache(
        self, rotary: QueryRotary, k: Tensor, v: Tensor, context_len: int
    ) -> PagedKV:
        """Build a cache for `context_len` tokens that holds the earlier ones. k, v: [S', K, D]."""
        cache = allocate_cache(
            num_blocks=-(-context_len // BLOCK_SIZE), block_size=BLOCK_SIZE,
            num_kv_heads=self.config.num_kv_heads, head_dim=self.config.head_dim, dtype=k.dtype,
            device=k.device, means=needs_means(self.plan),
        )
        slots = torch.arange(k.shape[0], device=k.device)
        if len(slots):
            whole = torch.arange(len(slots) // BLOCK_SIZE, device=k.device)
            ops.store_kv(cache, k, v, slots, slots, whole, rotary)
        return cache

    def _layer(
        self, layer_idx: int, context_len: int, device: torch.device
    ) -> DualChunkAttention:
        config = self.config
        if config.dca is None and context_len > config.max_position_embeddings:
            raise InvalidRequestError(
                f"context of {context_len} tokens is longer than max_position_embeddings "
                f"{config.max_position_embeddings}, and the checkpoint has no DCA config"
            )
        if self.rotary is None or self.rotary.cos.device != device:
            num_rows = config.dca.chunk_size + 1 if config.dca else 0
            self.rotary = build_rotary(
                head_dim=config.head_dim, rope_theta=config.rope_theta,
                scaling=config.rope_scaling, dca=config.dca,
                max_model_len=max(config.max_position_embeddings, num_rows), device=device,
            )
            self.layers = {}
        if layer_idx not in self.layers:
            self.layers[layer_idx] = DualChunkAttention(
                layer_idx=layer_idx, num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, rotary=self.rotary,
                plan=self.plan,
            )
        return self.layers[layer_idx]


def unrotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Take back transformers' RoPE. x: [T, H, D]; positions: [T]; inv_freq: [D/2] fp32.

    transformers rounds cosine and sine to the model's type, which stretches by c^2 + s^2; the
    inverse uses the same rounded numbers. The rounding of x itself stays: compare in fp32.
    """
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos().to(x.dtype).float(), angles.sin().to(x.dtype).float()
    norm = cos.square() + sin.square()
    return ops.rotate(x, cos / norm, -sin / norm)


def _check_positions(position_ids: Tensor | None, expected: Tensor) -> None:
    if position_ids is not None and not bool((position_ids == expected).all()):
        raise InvalidRequestError(
            "longspan attention takes unpadded batches with consecutive positions from 0 and a "
            "dynamic cache; pass requests of unequal length one by one"
        )


def _no_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Refuse a padding mask, or one of a static cache; the causal mask is implied."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise InvalidRequestError(
            "longspan attention takes no padding: the attention mask has zeros; pass requests of "
            "unequal length one by one"
        )
