"""The attention block of the decoders: projections around dual chunk attention.

Shape legend: T packed tokens of one step, H query heads, K KV heads, D head dim, M model dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from longspan.attention.layer import DualChunkAttention
from longspan.attention.metadata import AttentionMetadata
from longspan.attention.ranks import RankGroup
from longspan.attention.sparsity import SparsityPlan
from longspan.config import ModelConfig
from longspan.model.forms import make_linear
from longspan.model.layers import RMSNorm
from longspan.model.linear import Activations, Target
from longspan.ops.int8_kv import key_gains
from longspan.ops.types import PagedKV, QueryRotary
from longspan.weight_form import PLAIN_FORMS, WeightForms


class Attention(nn.Module):
    """Merged q, k, v projection, head norms (Qwen3), dual chunk attention, output projection."""

    def __init__(
        self, config: ModelConfig, *, layer_idx: int, rotary: QueryRotary,
        plan: SparsityPlan | None, dtype: torch.dtype, device: torch.device | str,
        forms: WeightForms = PLAIN_FORMS, ranks: RankGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.qkv_proj = make_linear(
            forms.of("q_proj", "k_proj", "v_proj"), config.hidden_size,
            [count * config.head_dim for count in
             (config.num_heads, config.num_kv_heads, config.num_kv_heads)],
            bias=config.attention_bias, dtype=dtype, device=device)
        self.o_proj = make_linear(
            forms.of("o_proj"), config.num_heads * config.head_dim, (config.hidden_size,),
            bias=config.output_bias, dtype=dtype, device=device)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
        self.qk_norm, self.query_factor = config.qk_norm, config.query_factor
        self.core = DualChunkAttention(
            layer_idx=layer_idx, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, rotary=rotary, plan=plan, ranks=ranks,
        )

    def forward(
        self, x: Activations, metadata: AttentionMetadata, cache: PagedKV,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x: [T, M] normed hidden states, rounded as `group_of` says. Writes the tokens' keys and
        values to `cache`.

        Returns [T, M], or [n, M] for the n rows in ``wanted``, [n, M], if those alone attend.
        """
        q, k, v = self.project(x, metadata, wanted)
        return self.o_proj(self.core(q, k, v, cache, metadata).flatten(1))

    def group_of(self, x: Tensor, rows: Tensor | None) -> int | None:
        """See `Linear.group_of`; rows that are chosen are plain."""
        return self.qkv_proj.group_of(x) if rows is None else None

    def project(
        self, x: Activations, metadata: AttentionMetadata, wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [T, M]. Returns q: [T, H, D], or [n, H, D] of the n wanted rows, and k, v: [S, K, D],
        not rotated, of all ranks' rows if there are several (S = T with one)."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        division = metadata.division
        if wanted is None and (division is None or not isinstance(x, Tensor)):
            q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(heads, dim=1)
            k = self.k_norm(k) if self.qk_norm else k
            return self._query(q), *(
                (k, v) if division is None else division.begin(torch.stack((k, v), 1))())
        assert isinstance(x, Tensor)
        both = self._keys_and_values(x)
        wanted = x if wanted is None else wanted
        if division is None:
            return self._queries(wanted, slice(self.num_heads)), both[:, 0], both[:, 1]
        arrive = division.begin(both)
        with division.group.beside():
            q = self._queries(wanted, slice(self.num_heads))
        return q, *arrive()

    def project_apart(
        self, x: Activations, metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor, Tensor, Callable[[], Tensor] | None]:
        """Do the same for a single prefill slice, and begin what its selection needs of other
        ranks: see `DualChunkAttention.begin_prepare`, whose result comes last."""
        (item,), division = metadata.prefills, metadata.division
        if division is None or not isinstance(x, Tensor) or not (
                self.qkv_proj.divides and self.core.exchanges(item)):
            q, k, v = self.project(x, metadata)
            return q, k, v, self.core.begin_prepare(q, item)
        assert item.share is not None
        gather = division.begin(self._keys_and_values(x))
        with division.group.beside():
            exchange = item.share.begin_to_heads(
                partial(self._queries, x), self.num_heads, self.num_kv_heads)
        return exchange.whole(), *gather(), exchange.wait

    def _keys_and_values(self, x: Tensor) -> Tensor:
        """x: [T, M]. Returns [T, 2, K, D]."""
        shape = 2, self.num_kv_heads, self.head_dim
        both = self.qkv_proj.part(x, slice(self.num_heads * self.head_dim, None)).unflatten(
            -1, shape)
        if self.qk_norm:
            both[:, 0] = self.k_norm(both[:, 0])
        return both

    def _queries(self, x: Tensor, heads: slice) -> Tensor:
        """x: [n, M]. Returns queries of some heads, [n, h, D]."""
        start, stop, _ = heads.indices(self.num_heads)
        q = self.qkv_proj.part(x, slice(start * self.head_dim, stop * self.head_dim))
        return self._query(q.unflatten(-1, (-1, self.head_dim)))

    def _query(self, q: Tensor) -> Tensor:
        q = self.q_norm(q) if self.qk_norm else q
        return q if self.query_factor == 1 else q * self.query_factor

    def key_gains(self, inputs: Tensor) -> Tensor:
        """Return gains of the keys' channels for a cache in int8, [K, D] fp32, by their size as the
        weights tell it.

        inputs: [M] the size of each input, as the norm before gives it.
        """
        shape = (self.num_kv_heads, self.head_dim)
        if self.qk_norm:
            return key_gains(self.k_norm.weight.expand(shape))
        start = self.num_heads * self.head_dim
        keys = slice(start, start + self.num_kv_heads * self.head_dim)
        # whatever form the weights have: one input after the other, for independent inputs
        sizes = self.qkv_proj.part(torch.diag(inputs), keys).float()
        if self.qkv_proj.bias is None:
            return key_gains(sizes.square().sum(0).sqrt().view(shape))
        bias = self.qkv_proj.bias[keys].float()
        return key_gains(
            ((sizes - bias).square().sum(0) + bias.square()).sqrt().view(shape))

    def weight_targets(self) -> dict[str, Target]:
        """Return targets as `CausalLM.weight_targets`: the merged projection is stored as three."""
        targets = self.qkv_proj.targets("q_proj", "k_proj", "v_proj")
        targets |= self.o_proj.targets("o_proj")
        if self.qk_norm:
            targets |= {**self.q_norm.targets("q_norm"), **self.k_norm.targets("k_norm")}
        return targets
