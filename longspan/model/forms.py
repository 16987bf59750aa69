"""Which class holds a matrix of each form."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longspan.model.fp8 import Fp8Linear
from longspan.model.int4 import Int4Linear
from longspan.model.int4_cpu import Int4CpuLinear
from longspan.model.int8 import Int8Linear, Int8Table
from longspan.model.linear import Linear, PlainLinear, plain_linear
from longspan.weight_form import FormKind, WeightForm

LINEARS: dict[FormKind, type[Linear]] = {
    "plain": PlainLinear, "fp8-rows": Fp8Linear, "fp8-blocks": Fp8Linear, "int4": Int4Linear,
    "int4-cpu": Int4CpuLinear, "int8-rows": Int8Linear}


def make_linear(
    form: WeightForm, in_features: int, sizes: Sequence[int], *, bias: bool = False,
    dtype: torch.dtype, device: torch.device | str,
) -> Linear:
    """Allocate a product with weights of ``form``, or plain ones where it does not fit; see
    `Linear`."""
    form = form.fitting(sizes, in_features)
    return LINEARS[form.kind](form, in_features, sizes, bias=bias, dtype=dtype, device=device)


def make_embedding(
    form: WeightForm, width: int, num_tokens: int, *, is_head: bool, dtype: torch.dtype,
    device: torch.device | str,
) -> PlainLinear | Int8Table:
    """Allocate an embedding. ``is_head``: it is the product with the head too."""
    if form.kind == "int8-rows":
        return Int8Table(form, width, num_tokens, dtype=dtype, device=device, packs=is_head)
    return plain_linear(width, num_tokens, dtype=dtype, device=device)
