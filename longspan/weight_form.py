"""What matrices of a model are held in: the number format, and which matrices have it.

Standard library only: memory is planned by it before any weight is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, Self

FormKind = Literal["plain", "fp8-rows"]
LABELS: dict[FormKind, str] = {"plain": "not quantised", "fp8-rows": "fp8, a scale for each row"}
SCALE_BYTES = 4
"""fp32"""


@dataclass(frozen=True, slots=True)
class WeightForm:
    """A number format of one matrix [out, in]."""

    kind: FormKind = "plain"
    """``plain``: the engine's own type. ``fp8-rows``: e4m3 with one scale for each output."""

    @property
    def label(self) -> str:
        """Its name for a person."""
        return LABELS[self.kind]

    def num_bytes(self, out_features: int, in_features: int, element: int) -> int:
        """Bytes of a matrix, scales included. ``element``: bytes of a plain number."""
        if self.kind == "plain":
            return out_features * in_features * element
        return out_features * (in_features + SCALE_BYTES)


PLAIN = WeightForm()


@dataclass(frozen=True, slots=True)
class WeightForms:
    """The form of every matrix in a model's layers, by its name in a checkpoint.

    Embedding, head, norms, biases and the routers of experts are always plain.
    """

    form: WeightForm = PLAIN
    ignored: tuple[str, ...] = ()
    """Modules that stay plain: names or their beginnings or ends, or ``re:`` and a pattern."""
    prefix: str = ""
    """What names begin with here, see `within`."""

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
