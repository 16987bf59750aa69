"""What matrices of a model are held in: the number format, and which matrices have it.

Standard library only: memory is planned by it before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

FormKind = Literal["plain", "fp8-rows", "fp8-blocks", "int4", "int4-cpu", "int8-rows"]
LABELS: dict[FormKind, str] = {
    "plain": "not quantised", "fp8-rows": "fp8, a scale for each row",
    "fp8-blocks": "fp8, a scale for each 128 x 128", "int4": "int4 in groups",
    "int4-cpu": "int4 in groups", "int8-rows": "int8, a scale for each row"}
FOR_CPUS: tuple[FormKind, ...] = ("int4-cpu", "int8-rows")
"""Read by products of CPUs, never made plain; embedding and head are int8 beside them."""
BLOCK = 128
"""Rows and columns of a matrix that share a scale in ``fp8-blocks``."""
INT4_GROUPS = (128, 64, 32)
"""Group sizes for matrices whose width the wanted one does not divide."""
INT4_TILE = 32
"""Columns whose nibbles lie together: widths and groups are multiples."""
SCALE_BYTES = 4
"""fp32"""
GROUP_BYTES, GROUP_BYTES_CPU = 3, 4
"""Scale and zero point of an int4 group: fp16 and a byte; on CPUs two bf16."""
CPU_GROUPS, CPU_OUTPUTS = (32, 64, 128, 256), 16
"""Group sizes of ``int4-cpu``, and what its outputs are a multiple of."""


@dataclass(frozen=True, slots=True)
class WeightForm:
    """A number format of one matrix [out, in]."""

    kind: FormKind = "plain"
    """``plain``: the engine's own type. ``fp8-rows``: e4m3 with one scale for each output.
    ``fp8-blocks``: e4m3 with one for each block. ``int4``: four bits, groups of a row share a scale
    and a zero point. ``int4-cpu``: the same for PyTorch's product on CPUs. ``int8-rows``: int8 with
    one scale for each output, on CPUs."""
    group: int = 0
    """Numbers of an int4 group; 0: a whole row."""
    has_order: bool = False
    """int4 groups hold inputs in an order of their own (act order)."""

    @property
    def label(self) -> str:
        """Its name for a person."""
        return LABELS[self.kind]

    def fitting(self, sizes: Sequence[int], in_features: int, copies: int = 1) -> WeightForm:
        """Return the form of matrices that lie in one tensor: where this one cannot cut them
        there, plain.

        Args:
            sizes: outputs of each.
            copies: so often, one under the other.
        """
        if self.kind == "fp8-blocks" and len(sizes) * copies > 1 and any(
                size % BLOCK for size in sizes):
            return PLAIN
        if self.kind not in ("int4", "int4-cpu"):
            return self
        group = self.group or (INT4_TILE if self.kind == "int4-cpu" else in_features)
        if in_features % group and not self.has_order:
            group = next((size for size in INT4_GROUPS if in_features % size == 0), in_features)
        cannot = in_features % group or group % INT4_TILE
        if self.kind == "int4-cpu":
            cannot = cannot or group not in CPU_GROUPS or sum(sizes) % CPU_OUTPUTS
        return PLAIN if cannot else replace(self, group=group)

    def num_bytes(self, sizes: Sequence[int], in_features: int, element: int) -> int:
        """Bytes of matrices in one tensor, scales included. ``element``: bytes of a plain
        number."""
        out_features = sum(sizes)
        if self.kind == "plain":
            return out_features * in_features * element
        if self.kind in ("fp8-rows", "int8-rows"):
            return out_features * (in_features + SCALE_BYTES)
        if self.kind == "fp8-blocks":
            blocks = -(-out_features // BLOCK) * -(-in_features // BLOCK)
            return out_features * in_features + blocks * SCALE_BYTES
        order = 4 * in_features * len(sizes) if self.has_order else 0
        each = GROUP_BYTES_CPU if self.kind == "int4-cpu" else GROUP_BYTES
        return out_features * (in_features // 2 + in_features // self.group * each) + order


PLAIN = WeightForm()


@dataclass(frozen=True, slots=True)
class WeightForms:
    """The form of every matrix in a model's layers, by its name in a checkpoint.

    Norms, biases and the routers of experts are always plain, embedding and head too but on CPUs,
    which read the head for every token: beside int8 and int4 they are int8.
    """

    form: WeightForm = PLAIN
    ignored: tuple[str, ...] = ()
    """Modules that stay plain: names or their beginnings or ends, or ``re:`` and a pattern."""
    prefix: str = ""
    """What names begin with here, see `within`."""

    @property
    def vocabulary(self) -> WeightForm:
        """Form of embedding and head."""
        return WeightForm("int8-rows") if self.form.kind in FOR_CPUS else PLAIN

    def within(self, name: str) -> Self:
        """Return the forms for names inside a module."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def of(self, *names: str) -> WeightForm:
        """Return the form that matrices which lie in one tensor share: plain if one of them is."""
        if any(is_named(self.prefix + name, self.ignored) for name in names):
            return PLAIN
        return self.form


PLAIN_FORMS = WeightForms()


def is_named(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a list of modules names this one: itself, a module around it, the end of its
    name, or by a pattern behind ``re:``."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif f".{name}.".startswith(f".{pattern}.") or f".{name}".endswith(f".{pattern}"):
            return True
    return False
