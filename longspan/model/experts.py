"""MLPs of routed experts, as Qwen2-MoE and Qwen3-MoE have them.

Shape legend: T packed tokens of one step, M model dim, E experts, F width of one expert.
Sources: transformers `modeling_qwen2_moe.py`, `modeling_qwen3_moe.py` (numerics, tensor names).

Experts are kept whole, each with all of its width. Where an engine comes to split a layer over
devices, it shares out experts and not their columns: widths such as 768 are no multiple of the 128
that block-scaled formats need once they are divided.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.expert_config import ExpertConfig
from longspan.model.layers import MLP, Linear, mlp_rows, parameter
from longspan.ops import add_routed_mlp, route

EXPERT_ROWS = 16_384
"""Tokens that a layer's experts compute at a time on GPUs: each expert has hundreds of them."""


class Experts(nn.Module):
    """The weights of all experts of a layer, gate and up merged."""

    def __init__(
        self, num_experts: int, hidden_size: int, width: int, *, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.gate_up_proj = parameter(
            num_experts, 2 * width, hidden_size, dtype=dtype, device=device)
        self.down_proj = parameter(num_experts, hidden_size, width, dtype=dtype, device=device)

    def weight_targets(self) -> dict[str, Tensor]:
        """As `CausalLM.weight_targets`: three tensors an expert."""
        targets: dict[str, Tensor] = {}
        for expert, (gate_up, down) in enumerate(zip(
                self.gate_up_proj, self.down_proj, strict=True)):
            gate, up = gate_up.chunk(2)
            targets |= {f"{expert}.gate_proj.weight": gate, f"{expert}.up_proj.weight": up,
                        f"{expert}.down_proj.weight": down}
        return targets


class RoutedMLP(nn.Module):
    """A router, its experts, and the expert that every token takes, where there is one."""

    def __init__(
        self, hidden_size: int, config: ExpertConfig, *, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.num_chosen, self.is_normed = config.num_chosen, config.is_normed
        self.gate = Linear(hidden_size, config.num_experts, dtype=dtype, device=device)
        self.experts = Experts(
            config.num_experts, hidden_size, config.expert_size, dtype=dtype, device=device)
        self.has_shared = config.shared_size > 0
        if self.has_shared:
            self.shared_expert = MLP(hidden_size, config.shared_size, dtype=dtype, device=device)
            self.shared_expert_gate = Linear(hidden_size, 1, dtype=dtype, device=device)

    def add_to(self, hidden: Tensor, x: Tensor) -> None:
        """x: [T, M]; the result is added to ``hidden`` [T, M], in place."""
        weights, experts = route(self.logits(x), self.num_chosen, self.is_normed)
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

    def weight_targets(self) -> dict[str, Tensor]:
        """As `CausalLM.weight_targets`."""
        targets: dict[str, Tensor] = {"gate.weight": self.gate.weight}
        targets |= {f"experts.{name}": tensor
                    for name, tensor in self.experts.weight_targets().items()}
        if self.has_shared:
            targets |= {f"shared_expert.{name}": tensor
                        for name, tensor in self.shared_expert.weight_targets().items()}
            targets["shared_expert_gate.weight"] = self.shared_expert_gate.weight
        return targets


def expert_rows(device_type: str) -> int:
    """Tokens that experts compute at a time on ``cpu`` or ``cuda``; memory plans need it too."""
    return mlp_rows(device_type) if device_type == "cpu" else EXPERT_ROWS
