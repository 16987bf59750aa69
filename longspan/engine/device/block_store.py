"""Host slots for KV blocks, and copies between them and the caches.

A slot holds one block of all layers, part by part: keys of every layer, values of every layer, then
the tile means where the caches have them. So it is one piece of memory, which a GPU copies at the
speed of its link, and a file takes as it is.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.engine.device.block_link import BlockLink, CopyWatch
from longspan.engine.transfer import Transfer
from longspan.errors import NotEnoughMemoryError
from longspan.ops.types import PagedKV
from longspan.units import in_gib

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
               torch.uint8: "U8", torch.int8: "I8"}
"""As safetensors calls them."""


class CachePart(NamedTuple):
    """One tensor of all layers' caches."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """[L, ...] of one block."""
    rows: tuple[Tensor, ...]
    """For each layer [N, words]: its blocks as integers."""
    start: int
    """First byte in a slot."""
    row_bytes: int
    """Bytes of one layer."""


def cache_parts(caches: Sequence[PagedKV]) -> list[CachePart]:
    """List what a block consists of, in the order of slots and files."""
    parts, start = list[CachePart](), 0
    every = [cache.by_block() for cache in caches]
    for name, first in every[0].items():
        row_bytes = first[0].numel() * first.element_size()
        word = torch.int64 if row_bytes % 8 == 0 else torch.uint8
        parts.append(CachePart(
            name, DTYPE_NAMES[first.dtype], (len(every), *first.shape[1:]),
            tuple(cache[name].flatten(1).view(torch.uint8).view(word) for cache in every),
            start, row_bytes))
        start += len(every) * row_bytes
    return parts


class BlockStore:
    """The slots of one engine. Copies are queued on GPUs and done at once on CPUs.

    Args:
        caches: of all layers.

    Raises `NotEnoughMemoryError` when the memory cannot be had.
    """

    def __init__(self, caches: Sequence[PagedKV], num_slots: int) -> None:
        self.parts = cache_parts(caches)
        last = self.parts[-1]
        self.block_bytes = last.start + last.shape[0] * last.row_bytes
        self._device = caches[0].k.device
        self.memory = _allocate(num_slots * self.block_bytes, self._device).view(num_slots, -1)
        self._link = self._open_link() if self._device.type == "cuda" else None

    @property
    def bytes_of(self) -> NDArray[np.uint8]:
        """[slots, block_bytes] the host's memory."""
        array: NDArray[np.uint8] = self.memory.numpy()
        return array

    def copy(self, transfer: Transfer, after: torch.cuda.Event | None) -> CopyWatch:
        """Save or load the blocks of a transfer.

        Args:
            after: on GPUs, what has to be computed before.
        """
        if not transfer.slots:
            return CopyWatch(None)  # nothing was worth it, or there was no room
        if self._link is not None:
            return self._link.copy(transfer, after)
        self._move(transfer.kind, torch.tensor(transfer.slots), torch.tensor(transfer.blocks))
        return CopyWatch(None)

    def close(self) -> None:
        """Give the memory back."""
        if self._link is not None:
            self._link.synchronize()
            self._link = None
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
        self.parts, self.memory = [], torch.empty(0, 0, dtype=torch.uint8)

    def _open_link(self) -> BlockLink:
        from longspan.ops.block_rows import row_table

        places = [(rows, part.start + layer * part.row_bytes)
                  for part in self.parts for layer, rows in enumerate(part.rows)]
        table = row_table([rows for rows, _ in places], [start for _, start in places],
                          self.block_bytes)
        return BlockLink(table, self.memory, self._device)

    def _move(self, kind: str, slots: Tensor, blocks: Tensor) -> None:
        """Copy between caches and slots in the host's memory."""
        for part in self.parts:
            for layer, rows in enumerate(part.rows):
                start = part.start + layer * part.row_bytes
                there = self.memory[:, start:start + part.row_bytes].view(rows.dtype)
                if kind == "load":
                    rows.index_copy_(0, blocks, there.index_select(0, slots))
                else:
                    there.index_copy_(0, slots, rows.index_select(0, blocks))


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    """Allocate memory for slots, in large pages where the system has them; for GPUs pinned. On
    CPUs it is taken as slots are written, and goes back to the system in the end."""
    try:
        pages = mmap.mmap(-1, num_bytes)
    except OSError as error:
        raise _too_much(num_bytes, error.strerror or "no reason is known") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type != "cuda":
        return memory
    memory.zero_()  # by all threads: the driver would take each page on one
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
    if status:
        raise _too_much(num_bytes, f"CUDA error {status}")
    return memory


def _too_much(num_bytes: int, reason: str) -> NotEnoughMemoryError:
    return NotEnoughMemoryError(f"{in_gib(num_bytes)} of host memory cannot be pinned for the KV "
                                f"cache ({reason}); lower kv_host_gib")
