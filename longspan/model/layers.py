"""Parts that the decoders are made of: products with weights, norms, the SwiGLU MLP.

Shape legend: T packed tokens of one step, M model dim, F MLP dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.ops import add_rms_norm, rms_norm, silu_mul

MLP_ROWS, MLP_ROWS_CPU = 8_192, 2_048
"""Rows that the MLP computes at a time: its activations, 4 F numbers a row, are the largest of a
step. On one CPU core 2,048 rows are as fast as more, with a quarter of the memory."""


class Linear(nn.Module):
    """y = x W^T + b without an initial fill: every weight comes from a checkpoint."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False,
        dtype: torch.dtype, device: torch.device | str,
    ) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, sums: Tensor, x: Tensor) -> None:
        """Add the product, and the bias, to [T, out], in place, without writing it first."""
        sums.addmm_(x, self.weight.t())
        if self.bias is not None:
            sums.add_(self.bias)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """Compute some of the outputs only."""
        return F.linear(x, self.weight[outputs], None if self.bias is None else self.bias[outputs])


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

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the norm of x + residual, which replaces ``residual``. [T, dim]."""
        return add_rms_norm(x, residual, self.weight, self.eps)[0]


class MLP(nn.Module):
    """SwiGLU with gate and up merged into one product."""

    def __init__(
        self, hidden_size: int, width: int, *, bias: bool = False, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * width, bias=bias, dtype=dtype, device=device)
        self.down_proj = Linear(width, hidden_size, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[T, M] to the same."""
        return self.down_proj(silu_mul(self.gate_up_proj(x)))

    def add_to(self, hidden: Tensor, x: Tensor) -> None:
        """x: [T, M]; the result is added to ``hidden`` [T, M], in place."""
        self.down_proj.add_to(hidden, silu_mul(self.gate_up_proj(x)))

    def rows_at_a_time(self, device_type: str) -> int:
        """Rows that `add_to` is best given on ``cpu`` or ``cuda``."""
        return mlp_rows(device_type)

    def weight_targets(self) -> dict[str, Tensor]:
        """As `CausalLM.weight_targets`: gate and up are stored apart."""
        targets: dict[str, Tensor] = {
            f"{name}_proj.{kind}": part
            for kind, merged in self.gate_up_proj.named_parameters()
            for name, part in zip(("gate", "up"), merged.chunk(2), strict=True)}
        return targets | named("down_proj", self.down_proj)


def mlp_rows(device_type: str) -> int:
    """Rows that the MLP computes at a time on ``cpu`` or ``cuda``; memory plans need it too."""
    return MLP_ROWS_CPU if device_type == "cpu" else MLP_ROWS


def named(name: str, linear: Linear) -> dict[str, Tensor]:
    """Weight and bias by their names in a checkpoint."""
    return {f"{name}.{kind}": tensor for kind, tensor in linear.named_parameters()}


def parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Allocate weights that are not filled and not trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
