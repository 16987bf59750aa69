"""Parts that the decoders are made of: norms, the SwiGLU MLP.

Shape legend: T packed tokens of one step, M model dim, F MLP dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longspan.model.forms import make_linear
from longspan.model.linear import Activations, Target, parameter
from longspan.ops import add_rms_norm, rms_norm, rms_norm_fp8, silu_mul, silu_mul_fp8
from longspan.weight_form import PLAIN_FORMS, WeightForms

MLP_ROWS, MLP_ROWS_CPU = 8_192, 512
"""Rows that the MLP computes at a time: its activations, 4 F numbers a row, are the largest of a
step. On one CPU core 512 rows are as fast as more, with less memory."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(
        self, dim: int, eps: float, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = parameter(dim, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to the same shape and type."""
        return rms_norm(x, self.weight, self.eps)

    def targets(self, name: str) -> dict[str, Target]:
        """Return where its weight goes."""
        return {f"{name}.weight": Target.of(self.weight)}

    def add(self, x: Tensor, residual: Tensor, group: int | None = None) -> Activations:
        """Return the norm of x + residual, which replaces ``residual``. [T, dim].

        Args:
            group: round it so, see `Linear.group_of`.
        """
        if group is not None:
            return rms_norm_fp8(x, residual, self.weight, self.eps, group)
        return add_rms_norm(x, residual, self.weight, self.eps)[0]

    def rounded(self, x: Tensor, group: int | None) -> Activations:
        """Return the norm of [T, dim], rounded; None: plain."""
        if group is None:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm_fp8(x, None, self.weight, self.eps, group)


class MLP(nn.Module):
    """SwiGLU with gate and up merged into one product."""

    def __init__(
        self, hidden_size: int, width: int, *, bias: bool = False, dtype: torch.dtype,
        device: torch.device | str, forms: WeightForms = PLAIN_FORMS,
    ) -> None:
        super().__init__()
        self.gate_up_proj = make_linear(
            forms.of("gate_proj", "up_proj"), hidden_size, (width, width), bias=bias, dtype=dtype,
            device=device)
        self.down_proj = make_linear(
            forms.of("down_proj"), width, (hidden_size,), bias=bias, dtype=dtype, device=device)

    def forward(self, x: Activations) -> Tensor:
        """[T, M] to the same."""
        return self.down_proj(self._activated(x))

    def add_to(self, hidden: Tensor, x: Activations) -> None:
        """x: [T, M]; the result is added to ``hidden`` [T, M], in place."""
        self.down_proj.add_to(hidden, self._activated(x))

    def group_of(self, x: Tensor) -> int | None:
        """See `Linear.group_of`."""
        return self.gate_up_proj.group_of(x)

    def _activated(self, x: Activations) -> Activations:
        gate_up = self.gate_up_proj(x)
        group = self.down_proj.group_of(gate_up[:, :self.down_proj.in_features])
        return silu_mul(gate_up) if group is None else silu_mul_fp8(gate_up, group)

    def rows_at_a_time(self, device_type: str) -> int:
        """Rows that `add_to` is best given on ``cpu`` or ``cuda``."""
        return mlp_rows(device_type)

    def weight_targets(self) -> dict[str, Target]:
        """As `CausalLM.weight_targets`: gate and up are stored apart."""
        return {**self.gate_up_proj.targets("gate_proj", "up_proj"),
                **self.down_proj.targets("down_proj")}


def mlp_rows(device_type: str) -> int:
    """Rows that the MLP computes at a time on ``cpu`` or ``cuda``; memory plans need it too."""
    return MLP_ROWS_CPU if device_type == "cpu" else MLP_ROWS

