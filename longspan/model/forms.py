"""Which class holds a matrix of each form."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longspan.model.fp8 import Fp8Linear
from longspan.model.linear import Linear, PlainLinear
from longspan.weight_form import FormKind, WeightForm

LINEARS: dict[FormKind, type[Linear]] = {"plain": PlainLinear, "fp8-rows": Fp8Linear}


def make_linear(
    form: WeightForm, in_features: int, sizes: Sequence[int], *, bias: bool = False,
    dtype: torch.dtype, device: torch.device | str,
) -> Linear:
    """Allocate a product with weights of ``form``; see `Linear`."""
    return LINEARS[form.kind](in_features, sizes, bias=bias, dtype=dtype, device=device)
