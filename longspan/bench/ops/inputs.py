"""Queries, keys and values for one layer of a shape, of several kinds of content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan import ops
from longspan.attention.cache import allocate_cache
from longspan.attention.rope import build_rotary
from longspan.bench.shapes import Shape
from longspan.config import DcaConfig
from longspan.model import TORCH_DTYPES
from longspan.ops.geometry import segments
from longspan.ops.types import PagedKV, QueryRotary
from longspan.units import default_dtype

CONTENTS = ("random", "local", "scattered")
"""random: gaussian; local: keys resemble the queries near them; scattered: queries match keys at
random distances, other ones for each head."""
BLOCK_SIZE = 128
NUM_DISTANCES = 16
TOPIC_LEN = 1024
"""Tokens between two independent topics of local content."""
WRITE_ROWS = 32_768


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """A request of S tokens in one layer's KV cache, and its queries as they are asked for."""

    k: Tensor
    """[S, K, D] not rotated."""
    v: Tensor
    """[S, K, D]"""
    cache: PagedKV
    block_table: Tensor
    rotary: QueryRotary
    scale: float
    make_queries: Callable[[int, int], Tensor]
    """(first position, count) to [count, H, D], not rotated."""

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.k.shape[0]

    def reading_with(self, rotary: QueryRotary) -> LayerInput:
        """Return the same cache under other rotations, for timing only: its keys stay unchanged."""
        return replace(self, rotary=rotary)

    def write(self) -> None:
        """Rotate the keys and fill the cache."""
        for start in range(0, self.num_tokens, WRITE_ROWS):
            stop = min(start + WRITE_ROWS, self.num_tokens)
            positions = torch.arange(start, stop, device=self.k.device)
            block_size = self.cache.k.shape[1]
            slots = self.block_table[positions // block_size] * block_size + positions % block_size
            whole = self.block_table[start // block_size : stop // block_size]
            ops.store_kv(self.cache, self.k[start:stop], self.v[start:stop], positions, slots,
                         whole, self.rotary)


def make_rotary(shape: Shape, num_tokens: int, device: str, dca: DcaConfig | None) -> QueryRotary:
    """Build the rotations of a shape; without ``dca`` plain RoPE."""
    return build_rotary(head_dim=shape.model.head_dim, rope_theta=shape.model.rope_theta,
                        scaling=shape.model.rope_scaling, max_model_len=num_tokens, dca=dca,
                        device=device)


def make_input(
    shape: Shape, num_tokens: int, content: str, device: str, *, seed: int = 0,
    rotary: QueryRotary | None = None, shuffled: bool = False,
) -> LayerInput:
    """Draw a layer's input and fill its cache.

    Args:
        rotary: default: the shape's own.
        shuffled: blocks out of order, and NaN in all that is not the request's.
    """
    model, dtype = shape.model, TORCH_DTYPES[default_dtype(device)]
    generator = torch.Generator(device).manual_seed(seed)
    rotary = rotary or make_rotary(shape, num_tokens, device, model.dca)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    num_kv_heads, head_dim = model.num_kv_heads, model.head_dim
    k, v = normal(num_tokens, num_kv_heads, head_dim), normal(num_tokens, num_kv_heads, head_dim)
    group = model.num_heads // num_kv_heads
    if content == "local":
        topics = normal(num_tokens // TOPIC_LEN + 2, num_kv_heads, head_dim)
        for start in range(0, num_tokens, WRITE_ROWS):
            stop = min(start + WRITE_ROWS, num_tokens)
            k[start:stop].mul_(0.5).add_(_topic(topics, start, stop))

        def queries(start: int, count: int) -> Tensor:
            near = _topic(topics, start, start + count).repeat_interleave(group, dim=1)
            return near.add_(normal(count, model.num_heads, head_dim), alpha=0.5)
    elif content == "scattered":
        distances = torch.randint(0, num_tokens, (model.num_heads, NUM_DISTANCES),
                                  generator=generator, device=device)

        def queries(start: int, count: int) -> Tensor:
            noise = normal(count, model.num_heads, head_dim)
            return _add_distant(noise, k, start, distances, rotary.inv_freq)
    else:
        assert content == "random", content

        def queries(start: int, count: int) -> Tensor:
            return normal(count, model.num_heads, head_dim)

    num_blocks = -(-num_tokens // BLOCK_SIZE)
    cache, table = _allocate(shape, num_blocks, dtype, device, shuffled)
    found = LayerInput(
        k=k, v=v, cache=cache, block_table=table, rotary=rotary, scale=head_dim**-0.5,
        make_queries=queries)
    found.write()
    return found


def last_segment(num_tokens: int, num_queries: int, stride: int) -> tuple[int, int]:
    """Return (start, count) of the last whole-tile queries that lie in one DCA chunk, at most
    ``num_queries`` of them: what selection is asked for at once."""
    stop = num_tokens // BLOCK_SIZE * BLOCK_SIZE
    start = max(0, stop - num_queries) // BLOCK_SIZE * BLOCK_SIZE
    start, stop = max(segments(start, stop, stride), key=lambda part: part[1] - part[0])
    return start, stop - start


def _allocate(
    shape: Shape, num_blocks: int, dtype: torch.dtype, device: str, shuffled: bool
) -> tuple[PagedKV, Tensor]:
    spare = 3 if shuffled else 0
    cache = allocate_cache(
        num_blocks=num_blocks + spare, block_size=BLOCK_SIZE, dtype=dtype,
        num_kv_heads=shape.model.num_kv_heads, head_dim=shape.model.head_dim, device=device,
        means=True)
    if not shuffled:
        return cache, torch.arange(num_blocks, device=device)
    for part in cache.by_block().values():
        part.fill_(float("nan"))
    order = torch.randperm(num_blocks + spare, generator=torch.Generator().manual_seed(1))
    return cache, order[:num_blocks].to(device)


def _topic(topics: Tensor, start: int, stop: int) -> Tensor:
    """Draw slowly changing vectors [stop - start, K, D] between the given ones [n, K, D]."""
    positions = torch.arange(start, stop, device=topics.device)
    index, share = positions // TOPIC_LEN, (positions % TOPIC_LEN) / TOPIC_LEN
    share = share[:, None, None].to(topics.dtype)
    return topics[index] * (1 - share) + topics[index + 1] * share


def _add_distant(
    q: Tensor, k: Tensor, start: int, distances: Tensor, inv_freq: Tensor
) -> Tensor:
    """Add to each query the keys at its head's distances, turned so that they match after RoPE."""
    positions = torch.arange(start, start + q.shape[0], device=q.device)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        for distance in distances[head]:
            angles = distance * inv_freq[None]
            keys = k[(positions - distance).clamp(min=0), head // group][:, None]
            q[:, head] += ops.rotate(keys, angles.cos(), -angles.sin())[:, 0] / 2
    return q
