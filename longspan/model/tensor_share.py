"""Tensor parallelism: what one of several ranks has of each layer.

A rank has some KV heads of every layer, with their query heads, and a share of the MLP's width. So
it computes some outputs of the first product of attention and of the MLP, and a part of the sum of
the second one; the parts are added up over the ranks before the residual is. Routed experts are
shared out whole, a run of neighbours to each rank. Norms, embedding and routers are the same
everywhere; the head, where it is a matrix of its own, is shared by tokens of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Self

from longspan.attention.head_order import kv_groups
from longspan.attention.ranks import Range, RankGroup
from longspan.attention.sparsity import SparsityPlan
from longspan.config import ModelConfig
from longspan.errors import LongspanError
from longspan.model.linear import Cut, Target
from longspan.weight_form import BLOCK, WeightForms
from longspan.weight_sizes import layer_matrices

LAYER_NAME = re.compile(
    r"model\.layers\.(\d+)\.(self_attn|mlp|mlp\.shared_expert)\.(\w+)_proj\.(weight|bias)")
HEAD_NAME = "lm_head.weight"


def model_of_rank(model: ModelConfig, size: int) -> ModelConfig:
    """Return the model as one of so many ranks has it: fewer heads, narrower MLPs. The vocabulary
    is counted whole, which errs on the safe side where the head is shared."""
    if size == 1:
        return model
    experts = model.experts and replace(
        model.experts, num_sharers=size, shared_size=model.experts.shared_size // size)
    return replace(model, num_heads=model.num_heads // size,
                   num_kv_heads=model.num_kv_heads // size, experts=experts,
                   intermediate_size=model.intermediate_size // size, sparse_budgets=None)


def check_share(model: ModelConfig, forms: WeightForms, size: int) -> None:
    """Raise `LongspanError` where so many ranks cannot share this model's tensors."""
    if size == 1:
        return
    begin = f"tensor_parallel {size}"
    for name, count in _shared_counts(model):
        if count % size:
            raise LongspanError(
                f"{begin}: the model has {count} {name}, which {size} ranks cannot share equally; "
                f"{_largest_divisor(model, size)} context_parallel")
    if model.experts is not None and model.experts.num_experts < size:
        raise LongspanError(f"{begin}: the model has {model.experts.num_experts} experts in a "
                            "layer, fewer than ranks; use as many at the most")
    if forms.form.has_order:
        raise LongspanError(f"{begin}: the checkpoint orders inputs by activation (desc_act, "
                            "actorder), so they cannot be cut; use context_parallel")
    part = model_of_rank(model, size)
    for idx in range(model.num_layers):
        for whole, own in zip(layer_matrices(model, forms, idx), layer_matrices(part, forms, idx),
                              strict=True):
            if (whole.sizes, whole.in_features) == (own.sizes, own.in_features):
                continue  # experts: whole ones
            if whole.form != own.form or not _keeps_blocks(own.form.kind, own.form.group, (
                    *own.sizes, own.in_features)):
                raise LongspanError(
                    f"{begin}: a matrix of {own.sizes[0]:,} x {own.in_features:,} is left to a "
                    f"rank, which cuts blocks of {whole.form.label}; use fewer ranks, or "
                    "context_parallel")


def _keeps_blocks(kind: str, group: int, sizes: tuple[int, ...]) -> bool:
    if kind == "fp8-blocks":
        return all(size % BLOCK == 0 for size in sizes)
    return kind != "int4" or sizes[-1] % (group or 1) == 0


def _shared_counts(model: ModelConfig) -> list[tuple[str, int]]:
    """List what is shared equally, by name."""
    found, experts = [("KV heads", model.num_kv_heads)], model.experts
    if experts is None or experts.num_routed(model.num_layers) < model.num_layers:
        found.append(("columns of its MLP", model.intermediate_size))
    if experts is not None and experts.shared_size:
        found.append(("columns of the expert that every token takes", experts.shared_size))
    return found


def _largest_divisor(model: ModelConfig, size: int) -> str:
    found = max(count for count in range(1, size)
                if not any(total % count for _, total in _shared_counts(model)))
    return f"use tensor_parallel {found}, or" if found > 1 else "use"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOfHeads(SparsityPlan):
    """Budgets of the heads that one rank has."""

    whole: SparsityPlan

    def first_sparse(self, index: int) -> int:
        """As `SparsityPlan`, of all ranks' heads: they must select for the same rows."""
        return self.whole.first_sparse(index)


@dataclass(frozen=True, slots=True)
class TensorShare:
    """What one rank has of a model."""

    group: RankGroup
    whole: ModelConfig
    kv_heads: tuple[tuple[int, ...], ...]
    """KV heads of this rank, by layer of the whole model."""

    @classmethod
    def of(cls, group: RankGroup, model: ModelConfig, plan: SparsityPlan | None) -> Self:
        """Choose the heads so that all ranks keep about as many keys."""
        return cls(group, model, tuple(
            kv_groups(plan, idx, model.num_kv_heads, group.size)[group.rank]
            for idx in range(model.num_layers)))

    @property
    def model(self) -> ModelConfig:
        """The model as this rank has it."""
        return model_of_rank(self.whole, self.group.size)

    @property
    def shares_head(self) -> bool:
        """Whether the vocabulary head is divided: not where it is the embedding too."""
        return not self.whole.tie_word_embeddings and (
            self.whole.vocab_size % self.group.size == 0)

    def plan(self, plan: SparsityPlan | None) -> SparsityPlan | None:
        """Return the budgets of this rank's heads."""
        if plan is None:
            return None
        vertical, slash = (tuple(
            tuple(row[head] for start, stop in self._heads(idx) for head in range(start, stop))
            for idx, row in enumerate(rows)) for rows in (plan.vertical, plan.slash))
        given = {each.name: getattr(plan, each.name) for each in fields(plan)}
        return PlanOfHeads(**given | {"vertical": vertical, "slash": slash}, whole=plan)

    def cut_targets(self, targets: Mapping[str, Target]) -> dict[str, Target]:
        """Return the targets of this rank's weights as parts of the whole ones."""
        return {name: self._cut(name, target) for name, target in targets.items()}

    def _heads(self, layer_idx: int) -> tuple[Range, ...]:
        """Query heads of this rank in a layer."""
        group = self.whole.num_heads // self.whole.num_kv_heads
        return tuple((head * group, (head + 1) * group) for head in self.kv_heads[layer_idx])

    def _cut(self, name: str, target: Target) -> Target:
        if name == HEAD_NAME and self.shares_head:
            return target.cut_rows((self._even(self.whole.vocab_size),), self.whole.vocab_size)
        found = LAYER_NAME.fullmatch(name)
        if found is None:
            return target
        idx, module, part, kind = int(found[1]), found[2], found[3], found[4]
        dim, whole = self.whole.head_dim, self.whole
        ranges, total = {
            "q": (self._heads(idx), whole.num_heads),
            "o": (self._heads(idx), whole.num_heads)}.get(part, (
                tuple((head, head + 1) for head in self.kv_heads[idx]), whole.num_kv_heads))
        if part in ("gate", "up", "down"):
            total, dim = self._width(module), 1
            ranges = (self._even(total),)
        ranges = tuple((start * dim, stop * dim) for start, stop in ranges)
        if part not in ("o", "down"):
            return target.cut_rows(ranges, total * dim)
        if kind == "weight":
            return replace(target, shape=(target.shape[0], total * dim),
                           cut=Cut(columns=joined(ranges)))
        # it is added once
        return target if self.group.rank == 0 else replace(
            target, fill=partial(_fill_zeros, target))

    def _width(self, module: str) -> int:
        """Return the width of a layer's MLP, or of the expert that every token takes."""
        experts = self.whole.experts
        if experts is not None and module == "mlp.shared_expert":
            return experts.shared_size
        return self.whole.intermediate_size

    def _even(self, count: int) -> Range:
        rank, size = self.group.rank, self.group.size
        return rank * count // size, (rank + 1) * count // size


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What a process has of a slice of the layers, besides the slice."""

    has_head: bool | None = None
    """It makes logits; None: where the last layer is. In a pipeline of processes the first one
    does, since the next token begins there."""
    share: TensorShare | None = None
    """What this rank has of each layer; None: all of it."""


WHOLE = ModelPart()


def _fill_zeros(target: Target, stored: object) -> None:
    import torch

    target.fill(torch.zeros(target.shape))


def joined(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """Join ranges that follow one another."""
    found = list[Range]()
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return tuple(found)
