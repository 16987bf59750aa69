"""Decoders of the Qwen2, Qwen3 and Llama shape over packed tokens, in reading order.

They differ in biases, head norms, rotary frequencies and routed experts, all facts of
`ModelConfig`.

A pipeline stage is the same class with a slice of the layers: the embedding lives on the stage
that holds layer 0, the final norm and the head on the one that holds the last layer.

Shape legend: T packed tokens of one step, H query heads, K KV heads, D head dim, M model dim,
I MLP dim, V vocabulary. There is no batch dimension; requests lie one after the other.
Sources: transformers `modeling_qwen2.py`, `modeling_qwen3.py`, `modeling_llama.py` (numerics,
tensor names).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from longspan.attention.layer import DualChunkAttention, Selector
from longspan.attention.metadata import AttentionMetadata
from longspan.attention.observer import AttentionObserver
from longspan.attention.ranks import RankGroup
from longspan.attention.sparsity import SparsityPlan
from longspan.config import ModelConfig
from longspan.model.attention_block import Attention
from longspan.model.experts import RoutedMLP
from longspan.model.forms import make_embedding, make_linear
from longspan.model.layers import MLP, RMSNorm
from longspan.model.linear import Linear, Target
from longspan.model.tensor_share import WHOLE, ModelPart
from longspan.ops.types import PagedKV, QueryRotary
from longspan.weight_form import PLAIN_FORMS, WeightForms

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""Names in a checkpoint of the weights outside the layers."""


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, added to the residual stream."""

    def __init__(
        self, config: ModelConfig, *, layer_idx: int, rotary: QueryRotary,
        plan: SparsityPlan | None, dtype: torch.dtype, device: torch.device | str,
        forms: WeightForms = PLAIN_FORMS, ranks: RankGroup | None = None,
    ) -> None:
        super().__init__()
        self._ranks = ranks
        norm_args = (config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(*norm_args, dtype=dtype, device=device)
        self.self_attn = Attention(
            config, layer_idx=layer_idx, rotary=rotary, plan=plan, dtype=dtype, device=device,
            forms=forms.within("self_attn"), ranks=ranks)
        self.post_attention_layernorm = RMSNorm(*norm_args, dtype=dtype, device=device)
        experts = config.experts
        self.mlp: MLP | RoutedMLP = (
            RoutedMLP(config.hidden_size, experts, dtype=dtype, device=device,
                      forms=forms.within("mlp"), rank=ranks.rank if ranks else 0)
            if experts is not None and experts.is_routed(layer_idx) else
            MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype,
                device=device, forms=forms.within("mlp")))

    def forward(self, hidden: Tensor, metadata: AttentionMetadata, cache: PagedKV) -> Tensor:
        """hidden: [T, M] residual stream, changed in place and returned; where the output is
        narrowed, its rows in a new tensor."""
        group = self.self_attn.group_of(hidden, metadata.output_rows)
        x, wanted = self.input_layernorm.rounded(hidden, group), None
        if metadata.output_rows is not None:
            hidden = metadata.outputs(hidden)
            assert isinstance(x, Tensor)
            wanted = x[metadata.output_rows] if metadata.division is None else (
                self.input_layernorm(hidden))
        self.finish(hidden, self.self_attn(x, metadata, cache, wanted))
        return hidden

    def forward_in_pieces(
        self, hidden: Tensor, metadata: AttentionMetadata, cache: PagedKV, cuts: Sequence[int],
    ) -> Generator[None, None, None]:
        """`forward` of a single prefill slice; yields between its pieces: keys and values, the
        selection, then the rows between two ``cuts``. Its frame is what a pause keeps, the keys
        of one layer included where ranks divide them.

        hidden: [T, M], changed in place.
        """
        (item,) = metadata.prefills
        attention = self.self_attn
        normed = self.input_layernorm.rounded(hidden, attention.group_of(hidden, None))
        q, k, v, arrive = attention.project_apart(normed, metadata)
        del normed
        attention.core.store(k, v, cache, metadata)
        del k, v
        yield
        cache, item = attention.core.collect(cache, item)
        parts = attention.core.prepare(q, cache, item, arrive)
        del arrive
        for start, stop in pairwise(item.local_cuts(cuts)):
            yield
            if start < stop:
                attended = attention.core.attend_rows(
                    q[start:stop], cache, item, parts, start)
                self.finish(hidden[start:stop], attention.o_proj(attended.flatten(1)))
                del attended

    def key_gains(self) -> Tensor:
        """Return gains of the keys' channels for a cache in int8, [K, D] fp32; once weights are
        loaded."""
        return self.self_attn.key_gains(self.input_layernorm.weight)

    def finish(self, hidden: Tensor, attended: Tensor) -> None:
        """Compute what follows attention. hidden: [T, M], changed in place; attended: [T, M]."""
        size = self.mlp.rows_at_a_time(hidden.device.type)
        if self._ranks is not None:
            self._finish_together(self._ranks, hidden.split(size), attended.split(size))
            return
        # pieces are views: each is added in place
        for piece, update in zip(hidden.split(size), attended.split(size), strict=True):
            group = self.mlp.group_of(piece)
            self.mlp.add_to(piece, self.post_attention_layernorm.add(update, piece, group))

    def _finish_together(
        self, ranks: RankGroup, pieces: Sequence[Tensor], parts: Sequence[Tensor],
    ) -> None:
        """Do the same where ranks share the layer's heads and widths: what each has computed is
        added up over them before it is added to the residual. A piece's sums are under way while
        the next one is computed.

        parts: [T, M] in all, this rank's parts of what attention gave.
        """
        sums, before = [ranks.begin_sum(part) for part in parts], None
        for piece, update in zip(pieces, sums, strict=True):
            x = self.post_attention_layernorm.add(update.wait(), piece, self.mlp.group_of(piece))
            under_way = piece, ranks.begin_sum(self.mlp(x))
            if before is not None:
                before[0].add_(before[1].wait())
            before = under_way
        if before is not None:
            before[0].add_(before[1].wait())

    def weight_targets(self) -> dict[str, Target]:
        """Return targets as `CausalLM.weight_targets`, with names within the layer."""
        parts = {"self_attn": self.self_attn.weight_targets(), "mlp": self.mlp.weight_targets()}
        return {
            **self.input_layernorm.targets("input_layernorm"),
            **self.post_attention_layernorm.targets("post_attention_layernorm"),
            **{f"{part}.{name}": target for part, targets in parts.items()
               for name, target in targets.items()}}


class CausalLM(nn.Module):
    """A slice of a decoder-only model. Weights are uninitialised until they are loaded.

    Args:
        part: what this process has; ``config`` and ``plan`` are the whole model's.
    """

    def __init__(
        self, config: ModelConfig, *, layers: range, rotary: QueryRotary,
        plan: SparsityPlan | None, dtype: torch.dtype, device: torch.device | str,
        forms: WeightForms = PLAIN_FORMS, part: ModelPart = WHOLE,
    ) -> None:
        super().__init__()
        assert layers.step == 1 and 0 <= layers.start < layers.stop <= config.num_layers, layers
        self.share = share = part.share
        if share is not None:
            config, plan = share.model, share.plan(plan)
        self.config, self.layer_range = config, layers
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_layers
        self.has_head = self.is_last if part.has_head is None else part.has_head
        shared = config.tie_word_embeddings and self.is_first and self.has_head
        if self.is_first:
            self.embed_tokens = make_embedding(
                forms.vocabulary, config.hidden_size, config.vocab_size, is_head=shared,
                dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config, layer_idx=idx, rotary=rotary, plan=plan, dtype=dtype, device=device,
                forms=forms.within(f"model.layers.{idx}"), ranks=share.group if share else None)
            for idx in layers
        )
        if self.is_last:
            self.norm = RMSNorm(
                config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        if self.has_head:
            self.lm_head: Linear = self.embed_tokens if shared else make_linear(
                forms.vocabulary, config.hidden_size,
                (config.vocab_size // (share.group.size if share and share.shares_head else 1),),
                dtype=dtype, device=device)

    def forward(
        self, hidden_or_ids: Tensor, metadata: AttentionMetadata, caches: Sequence[PagedKV]
    ) -> Tensor:
        """Compute one step of this stage.

        Args:
            hidden_or_ids: [T] int64 token ids on the first stage, else [T, M] hidden states,
                which may be changed in place.
            caches: one KV cache for each layer of this stage; written in place.

        Returns [T, M] hidden states; on the last stage after the final norm, and [n, M] where
        ``metadata.output_rows`` names n rows: the last layer computes no others.
        """
        try:
            next(self.forward_in_pieces(hidden_or_ids, metadata, caches, ()))
        except StopIteration as end:
            return cast(Tensor, end.value)
        raise AssertionError("a pass without cuts has no pauses")

    def forward_in_pieces(
        self, hidden_or_ids: Tensor, metadata: AttentionMetadata, caches: Sequence[PagedKV],
        cuts: Sequence[int], *, cut_last: bool = False,
    ) -> Generator[None, None, Tensor]:
        """`forward`, with pauses: yields between two pieces, which are the same operations on the
        same rows whether there is a pause or not. What the pieces are:
        `longspan.engine.control.chunking`.

        Args:
            hidden_or_ids, metadata, caches: as there; with ``cuts`` a single prefill slice.
            cuts: positions that part the slice's rows, its start and end included; none: the
                pass is one piece.
            cut_last: all rows are wanted, and the last layer is cut as the others are.
        """
        hidden = hidden_or_ids
        if self.is_first:
            hidden = self.embed_tokens.rows(hidden_or_ids)
        wide = replace(metadata, output_rows=None, output=None)
        last = self.layer_range.stop - 1
        for idx, layer, cache in zip(self.layer_range, self.decoder_layers(), caches, strict=True):
            if cuts and idx > self.layer_range.start:
                yield
            if self.is_last and idx == last and not cut_last:
                hidden = layer(hidden, metadata, cache)  # keys of all rows, queries of few
            elif cuts:
                yield from layer.forward_in_pieces(hidden, wide, cache, cuts)
            else:
                hidden = layer(hidden, wide, cache)
        return self.norm(hidden) if self.is_last else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary, where the head is. hidden: [n, M]; returns [n, V] fp32."""
        own: Tensor = self.lm_head(hidden).float()
        if self.share is None or not self.share.shares_head:
            return own
        return self.share.group.gather(own).transpose(0, 1).flatten(1)

    def attention_stats(self) -> tuple[float, float]:
        """(kept, causal) query-key pairs since the last reset, summed over layers and heads.

        Reading waits for the device.
        """
        kept, causal = self.attention_pairs()
        return float(kept), causal

    def attention_pairs(self) -> tuple[Tensor | float, float]:
        """Return pairs as `attention_stats`, kept ones where counted, without a wait."""
        cores = self._attention_cores()
        return sum((core.kept_pairs for core in cores), 0.0), sum(
            core.causal_pairs for core in cores)

    def observe_attention(self, observer: AttentionObserver | None) -> None:
        """Tell ``observer`` what every layer's prefill does; None: nobody."""
        for core in self._attention_cores():
            core.observer = observer

    def select_by(self, selector: Selector | None) -> None:
        """Let ``selector`` choose what sparse prefill keeps; None: the product's selection."""
        for core in self._attention_cores():
            core.selector = selector

    def reset_attention_stats(self) -> None:
        """Start counting pairs anew."""
        for core in self._attention_cores():
            core.reset_stats()

    def weight_targets(self) -> dict[str, Target]:
        """Return where this stage's weights go, by their plain names in a checkpoint."""
        targets: dict[str, Target] = {}
        if self.is_first:
            targets |= self.embed_tokens.targets(EMBEDDING.removesuffix(".weight"))
        for idx, layer in zip(self.layer_range, self.decoder_layers(), strict=True):
            targets |= {f"model.layers.{idx}.{name}": target
                        for name, target in layer.weight_targets().items()}
        if self.is_last:
            targets[NORM] = Target.of(self.norm.weight)
        if self.has_head:
            # With tied embeddings on one stage both names are the same storage.
            name = EMBEDDING if self.config.tie_word_embeddings else HEAD
            targets |= self.lm_head.targets(name.removesuffix(".weight"))
        return targets if self.share is None else self.share.cut_targets(targets)

    def whole_experts(self) -> dict[int, tuple[Target, Target]]:
        """Return the targets of all experts in one tensor, by layer: [E, 2F, M] and [E, M, F]."""
        return {idx: layer.mlp.experts.whole_targets()
                for idx, layer in zip(self.layer_range, self.decoder_layers(), strict=True)
                if isinstance(layer.mlp, RoutedMLP)}

    def checkpoint_names(self) -> set[str]:
        """Return all names that a checkpoint of the model may hold, a redundant head included."""
        layer = [name for name in self.decoder_layers()[0].weight_targets()
                 if not name.startswith("mlp.")]
        return {EMBEDDING, NORM, HEAD} | {
            f"model.layers.{idx}.{name}" for idx in range(self.config.num_layers)
            for name in (*layer, *mlp_names(self.config, idx))}

    def decoder_layers(self) -> list[DecoderLayer]:
        """Return this stage's layers in order, with their type."""
        return [cast(DecoderLayer, layer) for layer in self.layers]

    def _attention_cores(self) -> list[DualChunkAttention]:
        return [layer.self_attn.core for layer in self.decoder_layers()]


def mlp_names(config: ModelConfig, layer_idx: int) -> list[str]:
    """List the weights of a layer's MLP by their names within the layer, whatever their stage."""
    experts = config.experts
    kinds = ("weight", "bias") if config.mlp_bias else ("weight",)
    names = [f"{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in kinds]
    if experts is None or not experts.is_routed(layer_idx):
        return [f"mlp.{name}" for name in names]
    found = ["gate.weight"]
    found += [f"experts.{expert}.{name}" for expert in range(experts.num_experts) for name in names]
    if experts.shared_size:
        found += [*(f"shared_expert.{name}" for name in names), "shared_expert_gate.weight"]
    return [f"mlp.{name}" for name in found]
