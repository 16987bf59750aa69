"""MLPs of routed experts, as Qwen2-MoE and Qwen3-MoE have them.

Shape legend: T packed tokens of one step, M model dim, E experts, F width of one expert.
Sources: transformers `modeling_qwen2_moe.py`, `modeling_qwen3_moe.py` (numerics, tensor names).

Ranks that share a layer share out experts and not their columns: widths such as 768 are no multiple
of the 128 that block-scaled formats need once they are divided. Every rank routes every token, and
computes what its own experts add.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.expert_config import ExpertConfig
from longspan.model.forms import make_linear
from longspan.model.layers import MLP, mlp_rows
from longspan.model.linear import Activations, Cut, Linear, Target, plain_linear
from longspan.ops import add_routed_mlp, route
from longspan.ops.types import Matrices
from longspan.weight_form import PLAIN_FORMS, WeightForms

EXPERT_ROWS = 16_384
"""Tokens that a layer's experts compute at a time on GPUs: each expert has hundreds of them."""


class Experts(nn.Module):
    """The weights of a rank's experts of a layer, one under the other, gate and up merged.

    Args:
        held: numbers of the experts that are here.
        total: experts of the layer.
    """

    def __init__(
        self, held: range, total: int, hidden_size: int, width: int, *, dtype: torch.dtype,
        device: torch.device | str, forms: WeightForms = PLAIN_FORMS,
    ) -> None:
        super().__init__()
        self.held, self.total, self.hidden_size, self.width = held, total, hidden_size, width
        num_experts = len(held)
        one = forms.within("0")  # all experts of a layer have its form
        self.gate_up = make_linear(
            one.of("gate_proj", "up_proj"), hidden_size, (width, width) * num_experts,
            dtype=dtype, device=device)
        self.down = make_linear(
            one.of("down_proj"), width, (hidden_size,) * num_experts, dtype=dtype, device=device)

    @property
    def gate_up_proj(self) -> Matrices:
        """All experts' gates and ups, [E, 2F, M]."""
        return self.gate_up.stack(len(self.held))

    @property
    def down_proj(self) -> Matrices:
        """All experts' outputs, [E, M, F]."""
        return self.down.stack(len(self.held))

    def here(self, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Count the chosen experts as they lie here; those of other ranks are one more, of
        weight 0. weights, experts: [T, k]."""
        count = len(self.held)
        if count == self.total:
            return weights, experts
        places = experts - self.held.start
        is_elsewhere = (places < 0) | (places >= count)
        return weights.masked_fill(is_elsewhere, 0.0), places.masked_fill(is_elsewhere, count)

    def weight_targets(self) -> dict[str, Target]:
        """As `CausalLM.weight_targets`: three tensors an expert."""
        return {
            **self.gate_up.targets(*(f"{expert}.{part}_proj" for expert in self.held
                                     for part in ("gate", "up"))),
            **self.down.targets(*(f"{expert}.down_proj" for expert in self.held))}

    def whole_targets(self) -> tuple[Target, Target]:
        """Return the targets of all the layer's experts in one tensor: [E, 2F, M] and
        [E, M, F]."""
        def whole(linear: Linear, rows: int) -> Target:
            def fill(stored: Tensor) -> None:
                for expert, matrix in enumerate(stored):
                    linear.fill(slice(expert * rows, (expert + 1) * rows), matrix)

            return Target((self.total, rows, linear.in_features), fill,
                          cut=Cut(rows=((self.held.start, self.held.stop),)))

        return whole(self.gate_up, 2 * self.width), whole(self.down, self.hidden_size)


class RoutedMLP(nn.Module):
    """A router, its experts, and the expert that every token takes, where there is one.

    Args:
        rank: of those that share the layer.
    """

    def __init__(
        self, hidden_size: int, config: ExpertConfig, *, dtype: torch.dtype,
        device: torch.device | str, forms: WeightForms = PLAIN_FORMS, rank: int = 0,
    ) -> None:
        super().__init__()
        self.num_chosen, self.is_normed = config.num_chosen, config.is_normed
        self.gate = plain_linear(hidden_size, config.num_experts, dtype=dtype, device=device)
        self.experts = Experts(
            config.held_by(rank), config.num_experts, hidden_size, config.expert_size,
            dtype=dtype, device=device, forms=forms.within("experts"))
        self.has_shared = config.shared_size > 0
        if self.has_shared:
            self.shared_expert = MLP(hidden_size, config.shared_size, dtype=dtype, device=device,
                                     forms=forms.within("shared_expert"))
            self.shared_expert_gate = plain_linear(hidden_size, 1, dtype=dtype, device=device)

    def group_of(self, x: Tensor) -> int | None:
        """See `Linear.group_of`: the router takes plain activations."""
        return None

    def forward(self, x: Activations) -> Tensor:
        """[T, M] to the same."""
        assert isinstance(x, Tensor)
        sums = torch.zeros_like(x)
        self.add_to(sums, x)
        return sums

    def add_to(self, hidden: Tensor, x: Activations) -> None:
        """x: [T, M]; the result is added to ``hidden`` [T, M], in place."""
        assert isinstance(x, Tensor)
        weights, experts = self.experts.here(
            *route(self.logits(x), self.num_chosen, self.is_normed))
        add_routed_mlp(hidden, x, weights, experts, self.experts.gate_up_proj,
                       self.experts.down_proj)
        if self.has_shared:
            opened = self.shared_expert_gate(x).float().sigmoid().to(x.dtype)
            hidden.addcmul_(opened, self.shared_expert(x))

    def logits(self, x: Tensor) -> Tensor:
        """Multiply by the router in fp32, so that which experts a token takes is no matter of
        rounding. x: [T, M]; returns [T, E] fp32."""
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, self.gate.weight.t(), out_dtype=torch.float32)
        return F.linear(x.float(), self.gate.weight.float())

    def rows_at_a_time(self, device_type: str) -> int:
        """Rows that `add_to` is best given on ``cpu`` or ``cuda``."""
        return expert_rows(device_type)

    def weight_targets(self) -> dict[str, Target]:
        """As `CausalLM.weight_targets`."""
        targets = self.gate.targets("gate")
        targets |= {f"experts.{name}": target
                    for name, target in self.experts.weight_targets().items()}
        if self.has_shared:
            targets |= {f"shared_expert.{name}": target
                        for name, target in self.shared_expert.weight_targets().items()}
            targets |= self.shared_expert_gate.targets("shared_expert_gate")
        return targets


def expert_rows(device_type: str) -> int:
    """Tokens that experts compute at a time on ``cpu`` or ``cuda``; memory plans need it too."""
    return mlp_rows(device_type) if device_type == "cpu" else EXPERT_ROWS
