"""The way of KV blocks between a GPU's caches and pinned slots of host memory.

Whole slots go over the link to and from *stages* on the device, by the copy engines; one kernel
moves all rows of a stage to or from the caches (`longspan.ops.block_rows`). Each direction has a
stream and two stages that take turns, so that its link goes on while the kernel runs, and both
directions go on at the same time. Kernels of both share one stream: what is loaded into a block
waits for what was saved from it before, and for no more than that. The host only queues all this: a
handful of calls for each stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.engine.transfer import Transfer

if TYPE_CHECKING:
    from longspan.ops.block_rows import RowTable

STAGE_BYTES = 64 * 1024**2
"""Size of a stage, about; at least one block. Smaller ones take more calls, and are no faster."""
NUM_STAGES = 2
"""Stages of each direction."""


def stage_blocks(block_bytes: int) -> int:
    """Return the blocks that a stage holds."""
    return max(1, STAGE_BYTES // block_bytes)


def link_bytes(block_bytes: int) -> int:
    """Return the device's memory that the stages of both directions take."""
    return 2 * NUM_STAGES * stage_blocks(block_bytes) * block_bytes


class CopyWatch:
    """Tells when a copy is done, and how long it took.

    Args:
        stream: where it begins, behind the one before it; None: it is done at once.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._events = None if stream is None else (
            torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        if self._events is not None:
            self._events[0].record(stream)

    def stop(self, stream: torch.cuda.Stream) -> None:
        """Mark the end of the copy."""
        assert self._events is not None
        self._events[1].record(stream)

    @property
    def is_over(self) -> bool:
        """The copy is done."""
        return self._events is None or self._events[1].query()

    def seconds(self) -> float:
        """Return the time of a copy that is over; 0 on CPUs."""
        return 0.0 if self._events is None else 1e-3 * self._events[0].elapsed_time(self._events[1])


class _Stage:
    """Room for a few blocks on the device."""

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_blocks, block_bytes, dtype=torch.uint8, device=device)
        self.full, self.free = torch.cuda.Event(), torch.cuda.Event()


class _Way:
    """One direction."""

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._stages = [_Stage(num_blocks, block_bytes, device) for _ in range(NUM_STAGES)]
        self._num_used = 0

    def next_stage(self) -> _Stage:
        """Return the stage that was used longest ago."""
        self._num_used += 1
        return self._stages[self._num_used % NUM_STAGES]


class BlockLink:
    """Queues copies between the caches and the slots, and returns at once. One thread only.

    Args:
        table: the caches' rows, as a slot has them.
        slots: [num_slots, block_bytes] pinned.
    """

    def __init__(self, table: RowTable, slots: Tensor, device: torch.device) -> None:
        from longspan.ops.block_rows import pack_blocks, unpack_blocks

        self._pack, self._unpack = pack_blocks, unpack_blocks
        self._table, self._slots, self._device = table, slots, device
        self._size = min(stage_blocks(slots.shape[1]), len(slots))
        self._kernels = torch.cuda.Stream(device, priority=-1)
        self._ways = {kind: _Way(self._size, slots.shape[1], device) for kind in ("save", "load")}
        self._compile()

    def copy(self, transfer: Transfer, after: torch.cuda.Event | None) -> CopyWatch:
        """Save or load the blocks of a transfer.

        Args:
            after: what has to be computed before.
        """
        way = self._ways[transfer.kind]
        if after is not None:
            self._kernels.wait_event(after)
            way.stream.wait_event(after)  # so that this waiting is not counted as copying
        with torch.cuda.stream(self._kernels):
            blocks = torch.frombuffer(transfer.blocks, dtype=torch.int32).pin_memory().to(
                self._device, non_blocking=True)
        watch = CopyWatch(way.stream)
        move = self._load if transfer.kind == "load" else self._save
        for start, stop in _spans(len(transfer.slots), self._size):
            move(way, transfer.slots[start:stop], blocks[start:stop])
        watch.stop(self._kernels if transfer.kind == "load" else way.stream)
        return watch

    def synchronize(self) -> None:
        """Wait until nothing is under way."""
        for stream in (self._kernels, *(way.stream for way in self._ways.values())):
            stream.synchronize()

    def _compile(self) -> None:
        """Compile both kernels: a step must not wait for that. Block 0 stays as it is."""
        stage, block = self._ways["load"].next_stage(), torch.zeros(
            1, dtype=torch.int32, device=self._device)
        self._pack(self._table, block, stage.memory[:1])
        self._unpack(self._table, block, stage.memory[:1])
        torch.cuda.synchronize(self._device)

    def _load(self, way: _Way, slots: Sequence[int], blocks: Tensor) -> None:
        stage = way.next_stage()
        way.stream.wait_event(stage.free)
        with torch.cuda.stream(way.stream):
            for here, there in self._runs(stage, slots):
                here.copy_(there, non_blocking=True)
            stage.full.record(way.stream)
        self._kernels.wait_event(stage.full)
        with torch.cuda.stream(self._kernels):
            self._unpack(self._table, blocks, stage.memory[:len(slots)])
            stage.free.record(self._kernels)

    def _save(self, way: _Way, slots: Sequence[int], blocks: Tensor) -> None:
        stage = way.next_stage()
        self._kernels.wait_event(stage.free)
        with torch.cuda.stream(self._kernels):
            self._pack(self._table, blocks, stage.memory[:len(slots)])
            stage.full.record(self._kernels)
        way.stream.wait_event(stage.full)
        with torch.cuda.stream(way.stream):
            for here, there in self._runs(stage, slots):
                there.copy_(here, non_blocking=True)
            stage.free.record(way.stream)

    def _runs(self, stage: _Stage, slots: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair a stage's first rows with slots, consecutive ones in one piece."""
        cuts = [0, *(i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1), len(slots)]
        for start, stop in pairwise(cuts):
            first = slots[start]
            yield stage.memory[start:stop], self._slots[first:first + stop - start]


def _spans(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut ``count`` into as few spans of at most ``most`` as there can be, about equally long."""
    num_spans = -(-count // most)
    cuts = [count * index // num_spans for index in range(num_spans + 1)]
    yield from pairwise(cuts)
