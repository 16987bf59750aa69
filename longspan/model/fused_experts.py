"""Checkpoints that store all experts of a layer in one tensor, recognised by shape.

Names differ from writer to writer, and so does the order of axes. What is known is what a layer
needs: gate and up of E experts, merged or apart, and their down projection. Two tensors hold them,
merged as [E, 2F, M] (out before in, as transformers has it) or [E, M, 2F], and down as [E, M, F] or
[E, F, M]. Where a shape fits both orders (2F = M or F = M) it is read as transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from longspan.errors import CheckpointError
from longspan.model.linear import Target
from longspan.model.qwen2 import CausalLM

EXPERTS = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts\.)(.+)")
ONE_EXPERT = re.compile(r"(\d+)\.")
Stored = TypeVar("Stored")


def split_fused(
    stored: Mapping[str, Stored], model: CausalLM, shape_of: Callable[[Stored], tuple[int, ...]],
) -> tuple[dict[str, Target], set[str]]:
    """Return the model's targets, those of experts that are stored together replaced.

    Args:
        stored: a checkpoint's tensors by name.
        shape_of: the shape of a stored tensor.

    Returns the targets, of [E, ...] under the stored names, and the names of all tensors of that
    kind, whatever their layer. Raises `CheckpointError` for experts in a layout that is not known.
    """
    found, fused = model.weight_targets(), set[str]()
    if model.config.experts is None:
        return found, fused
    wholes = model.whole_experts()
    for layer, names in _layers(stored).items():
        fused |= set(names)
        prefix = f"model.layers.{layer}.mlp.experts."
        if layer not in wholes:
            continue  # of another stage, or a layer without experts: refused as unknown
        for name in [name for name in found if name.startswith(prefix)]:
            del found[name]
        merged, down = wholes[layer]
        shapes = {name: shape_of(stored[name]) for name in names}
        found |= _matched(shapes, merged, down, prefix)
    return found, fused


def _layers(stored: Mapping[str, object]) -> dict[int, list[str]]:
    """List the tensors of each layer's experts that are not one expert's."""
    layers: dict[int, list[str]] = {}
    for name in stored:
        match = EXPERTS.fullmatch(name)
        if match and not ONE_EXPERT.match(match[3]):
            layers.setdefault(int(match[2]), []).append(name)
    return layers


def _matched(
    shapes: Mapping[str, tuple[int, ...]], merged: Target, down: Target, prefix: str,
) -> dict[str, Target]:
    """Pair stored names with the targets that have their shapes."""
    gate_up = _only(shapes, merged, ())
    rest = _only(shapes, down, tuple(gate_up))
    if len(gate_up) == len(rest) == 1 and len(shapes) == 2:
        return gate_up | rest
    told = ", ".join(f"{name.removeprefix(prefix)} {list(shape)}"
                     for name, shape in sorted(shapes.items()))
    raise CheckpointError(
        f"{prefix.removesuffix('.')} are stored together as {told}, which is not known; needed are "
        f"{list(merged.shape)} and {list(down.shape)}, or both with their last two axes exchanged; "
        "convert the checkpoint with transformers' save_pretrained")


def _only(
    shapes: Mapping[str, tuple[int, ...]], whole: Target, taken: tuple[str, ...],
) -> dict[str, Target]:
    """Return the tensors that have a parameter's shape, as it is or else transposed."""
    count, rows, columns = whole.shape
    turned = replace(whole, shape=(count, columns, rows),
                     fill=lambda stored: whole.fill(stored.transpose(1, 2)))
    for target in (whole, turned):
        found = {name: target for name, shape in shapes.items()
                 if shape == target.shape and name not in taken}
        if found:
            return found
    return {}
