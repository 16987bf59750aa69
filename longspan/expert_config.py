"""What config.json says of routed experts (Qwen2-MoE, Qwen3-MoE). Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.errors import CheckpointError
from longspan.fields import Fields

COUNT_KEYS = ("num_experts", "num_local_experts")
"""The number of experts in transformers 4 and, for some families, 5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """Layers whose MLP is many small ones, of which a router chooses a few for each token."""

    num_experts: int
    num_chosen: int
    """Experts that a token is multiplied by (``num_experts_per_tok``)."""
    expert_size: int
    """Width of one expert (``moe_intermediate_size``)."""
    shared_size: int = 0
    """Width of the expert that every token takes besides, behind a gate of its own; 0: none."""
    is_normed: bool = False
    """The chosen experts' probabilities are divided by their sum (``norm_topk_prob``)."""
    every: int = 1
    """Layers ``every - 1``, ``2 every - 1``, ... have experts (``decoder_sparse_step``)."""
    dense_layers: frozenset[int] = frozenset()
    """Layers that have none all the same (``mlp_only_layers``)."""
    num_sharers: int = 1
    """Ranks that each hold some of a layer's experts, whole ones."""

    def __post_init__(self) -> None:
        if self.num_chosen > self.num_experts:
            raise CheckpointError(f"num_experts_per_tok {self.num_chosen} is more than num_experts "
                                  f"{self.num_experts}; correct config.json")

    def is_routed(self, layer_idx: int) -> bool:
        """Tell whether a layer has experts; the others have one MLP of ``intermediate_size``."""
        return layer_idx not in self.dense_layers and (layer_idx + 1) % self.every == 0

    def num_routed(self, num_layers: int) -> int:
        """Count the layers that have experts."""
        return sum(map(self.is_routed, range(num_layers)))

    @property
    def num_held(self) -> int:
        """Most experts of a layer that a rank holds."""
        return -(-self.num_experts // self.num_sharers)

    def held_by(self, rank: int) -> range:
        """Return the experts of a layer that one of the ranks holds: neighbours."""
        first, stop = (part * self.num_experts // self.num_sharers for part in (rank, rank + 1))
        return range(first, stop)

    def parameters(self, hidden_size: int, num_experts: int) -> int:
        """Count the weights of one layer's MLP with so many of its experts: with all of them what
        memory holds, with ``num_chosen`` what a token is multiplied by."""
        router = self.num_experts * hidden_size
        shared = 3 * hidden_size * self.shared_size + (hidden_size if self.shared_size else 0)
        return 3 * hidden_size * self.expert_size * num_experts + router + shared


def read_experts(need: Fields, *, has_shared: bool) -> ExpertConfig:
    """Read the experts of an architecture that has some. Raises `CheckpointError`."""
    counts = [need.integer(key) for key in COUNT_KEYS if need.raw.get(key) is not None]
    if len(set(counts)) > 1:
        raise CheckpointError(f"{need.source}: num_experts is {counts[0]} and num_local_experts "
                              f"{counts[1]}; correct config.json so that they agree")
    dense = need.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(idx) is not int or idx < 0 for idx in dense):
        raise need.wrong("mlp_only_layers", "a list of layers")
    return ExpertConfig(
        num_experts=counts[0] if counts else need.integer("num_experts"),
        num_chosen=need.integer("num_experts_per_tok"),
        expert_size=need.integer("moe_intermediate_size"),
        shared_size=need.integer("shared_expert_intermediate_size") if has_shared else 0,
        is_normed=need.boolean("norm_topk_prob"), every=need.integer("decoder_sparse_step", 1),
        dense_layers=frozenset(dense))
