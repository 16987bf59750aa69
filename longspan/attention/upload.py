"""What the host prepared for a step, sent to the device without waiting for it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Kernels are compiled anew for pointers that are less aligned."""

Value = TypeVar("Value")


def upload(value: Value, device: torch.device | str) -> Value:
    """Return ``value``, its tensors moved to the device; tuples and dataclasses are searched for
    them.

    All of them travel in one copy from pinned memory, and the host goes on at once; the allocator
    keeps that memory until it has been read. A tensor found twice stays one. On a CPU nothing is
    done.
    """
    if torch.device(device).type == "cpu":
        return value
    tensors = {id(tensor): tensor.contiguous() for tensor in _tensors(value)}
    packed = pack(list(tensors.values()), pin_memory=True)
    pieces = unpack(packed.to(device, non_blocking=True), list(tensors.values()))
    return _replaced(value, dict(zip(tensors, pieces, strict=True)))


def pack(tensors: list[Tensor], *, pin_memory: bool = False) -> Tensor:
    """Pack all of them into one tensor of bytes on their device, each at a multiple of
    `ALIGNMENT`."""
    packed = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=pin_memory,
                         device=tensors[0].device if tensors else None)
    for piece, tensor in zip(unpack(packed, tensors), tensors, strict=True):
        piece.copy_(tensor)
    return packed


def unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return views into what `pack` made, in the shapes and types of ``like``."""
    found, start = list[Tensor](), 0
    for tensor in like:
        num_bytes = tensor.numel() * tensor.element_size()
        found.append(packed[start : start + num_bytes].view(tensor.dtype).view(tensor.shape))
        start += _room(tensor)
    return found


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in _items(value) for tensor in _tensors(item)]


def _items(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return []


def _replaced(value: Any, found: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return found[id(value)]
    items = [_replaced(item, found) for item in _items(value)]
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **dict(zip(names, items, strict=True)))
    return value
