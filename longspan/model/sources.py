"""Where each weight of a model comes from in a checkpoint, checked before any is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from longspan.errors import CheckpointError
from longspan.model.linear import Cut, Stored, Target
from longspan.model.safetensors_files import (
    FLOAT_TYPES,
    TYPES,
    SafetensorsReader,
    StoredTensor,
    corrupt,
)
from longspan.model.stored_forms import Layout, cut_stored, layout_of
from longspan.quantization import CheckpointQuantization
from longspan.weight_form import PLAIN

MATRIX = ".weight"
SCALE_TYPES = (*FLOAT_TYPES, "F8_E8M0")
INTEGER_TYPES = ("I32", "I64")
NUMBER_TYPES = {
    "weight": (*FLOAT_TYPES, "F8_E4M3"), "qweight": ("I32",), "qzeros": ("I32",),
    "weight_packed": ("I32",), "weight_zero_point": ("I32",), "g_idx": INTEGER_TYPES,
    "weight_g_idx": INTEGER_TYPES}
"""Types that parts of quantised matrices may have; the others are scales."""


@dataclass(frozen=True, slots=True)
class Source:
    """One weight of the model in a checkpoint."""

    parts: Mapping[str, StoredTensor]
    """By suffix."""
    layout: Layout

    @property
    def is_plain(self) -> bool:
        """Whether it is one tensor of plain numbers."""
        return len(self.parts) == 1

    @property
    def place(self) -> tuple[Path, int]:
        """Where on the disk it begins: what it is read in order of."""
        return min((part.file, part.start) for part in self.parts.values())

    def read(self, reader: SafetensorsReader, cut: Cut | None = None) -> Stored:
        """Read all parts, or what ``cut`` leaves of the matrix: of plain ones no more is read, of
        quantised ones all is, for their parts lie each in an order of its own. Raises
        `CheckpointError` for numbers that mean nothing."""
        if cut is not None and self.is_plain:
            ((name, part),) = self.parts.items()
            return self.layout.decode({name: reader.read(part, cut)})
        stored = self.layout.decode({name: reader.read(part) for name, part in self.parts.items()})
        return stored if cut is None else cut_stored(stored, cut)


def find_sources(
    stored: Mapping[str, StoredTensor], targets: Mapping[str, Target],
    config: CheckpointQuantization | None, path: Path,
) -> dict[str, Source]:
    """Find the tensors that fill each target. Raises `CheckpointError` for missing and misshapen
    ones, and for types that are not supported."""
    layouts = {name: _layout(name, target, stored, config) for name, target in targets.items()}
    missing = [part for name, layout in layouts.items() for part in _names(name, layout)
               if part not in stored]
    if missing:
        total = sum(len(layout.shapes) for layout in layouts.values())
        raise CheckpointError(
            f"{path}: {len(missing)} of {total} tensors are missing, the first is "
            f"{missing[0]}; the checkpoint does not fit its config.json"
        )
    for name, layout in layouts.items():
        for part, (suffix, shapes) in zip(
                _names(name, layout), layout.shapes.items(), strict=True):
            _check(part, suffix, stored[part], shapes, is_quantised=len(layout.shapes) > 1)
        if config is not None and len(layout.shapes) == 1:
            _refuse_plain(name, targets[name], stored[name], config)
    return {name: Source({suffix: stored[part] for part, suffix in zip(
        _names(name, layout), layout.shapes, strict=True)}, layout)
        for name, layout in layouts.items()}


def _layout(
    name: str, target: Target, stored: Mapping[str, StoredTensor],
    config: CheckpointQuantization | None,
) -> Layout:
    if target.form is None:
        return Layout({"": (target.shape,)}, lambda parts: parts[""])
    module = name.removesuffix(MATRIX)
    entry = stored.get(name)
    return layout_of(module, target.shape, lambda suffix: f"{module}.{suffix}" in stored,
                     entry is not None and entry.dtype == "F8_E4M3", config)


def _names(name: str, layout: Layout) -> list[str]:
    """List the full names of a layout's tensors."""
    return [f"{name.removesuffix(MATRIX)}.{suffix}" if suffix else name
            for suffix in layout.shapes]


def _check(
    name: str, suffix: str, entry: StoredTensor, shapes: tuple[tuple[int, ...], ...], *,
    is_quantised: bool,
) -> None:
    if entry.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise CheckpointError(
            f"{entry.file}: {name} has shape {list(entry.shape)}, config.json asks for {wanted}")
    types = NUMBER_TYPES.get(suffix, SCALE_TYPES) if is_quantised else tuple(FLOAT_TYPES)
    if entry.dtype not in types:
        raise CheckpointError(
            f"{entry.file}: {name} is stored as {entry.dtype}; only {', '.join(types)} "
            "are supported, convert it or use an unquantised checkpoint"
        )
    if entry.stop - entry.start != prod(entry.shape) * TYPES[entry.dtype].itemsize:
        raise corrupt(entry.file)


def _refuse_plain(
    name: str, target: Target, entry: StoredTensor, config: CheckpointQuantization,
) -> None:
    """Refuse a plain matrix where config.json says that it is quantised: it would become so."""
    module = name.removesuffix(MATRIX)
    if target.form is not None and target.form != PLAIN:
        raise CheckpointError(
            f"{entry.file}: {name} is stored as {entry.dtype}, and quantization_config says that "
            f"it is {config.form.label}; name {module} in its modules_to_not_convert")
