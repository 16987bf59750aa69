"""Blocks on their way to disk, in the background. No torch.

A run of consecutive blocks waits by its hashes alone, so that nothing is kept from being evicted.
When its turn comes those blocks that are still there are held, copied to slots and written; a run
ends where one is gone. The queue is bounded: the oldest runs are lost first.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from dataclasses import dataclass, field

from longspan.engine.control.blocks import BlockPool
from longspan.engine.control.copy_queue import CopyQueue, Job, TierConfig
from longspan.engine.control.disk_index import DiskIndex
from longspan.engine.control.host_slots import HostSlots
from longspan.engine.kv_file import StoredRun, file_name, max_file_bytes
from longspan.engine.request import Request

MAX_RUNS = 2
"""Runs that are copied or written at a time: one is written while the next one is copied."""
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
"""Why a file is not written where the disk has no room."""
MAX_PAUSE = 256
"""After a failure runs are left out, twice as many after each further one, up to this."""


@dataclass(slots=True, eq=False, kw_only=True)
class Run:
    """Consecutive blocks of one chain, on their way to a file."""

    hashes: list[bytes]
    parent: bytes
    slots: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    """Blocks of the device that are kept until they are copied."""
    num_copies: int = 0
    """Copies to slots that have not ended."""


class WriteBehind:
    """The way to disk of one engine's blocks."""

    def __init__(
        self, config: TierConfig, pool: BlockPool, host: HostSlots, disk: DiskIndex,
        queue: CopyQueue, *, key: bytes, block_size: int,
    ) -> None:
        self._config, self._pool, self._host, self._disk = config, pool, host, disk
        self._queue, self._key, self._block_size = queue, key, block_size
        self._runs: deque[Run] = deque()
        self._active: list[Run] = []
        self._pending: set[bytes] = set()
        """Hashes of all runs."""
        self._max_pending = 2 * (pool.num_blocks + host.num_slots)
        self._num_failures = 0
        self._num_to_skip = 0

    @property
    def is_idle(self) -> bool:
        """No run waits or is under way."""
        return not (self._runs or self._active)

    @property
    def num_unwritten(self) -> int:
        """Blocks that wait or are under way."""
        return len(self._pending)

    def held_blocks(self) -> set[int]:
        """Return the device's blocks that are kept for copies."""
        return {block for run in self._active for block in run.held}

    def note(self, request: Request, *, is_over: bool) -> None:
        """Queue what a request has registered and the disk has not.

        Args:
            is_over: also a run that is shorter than others.
        """
        if not self._config.folder or (
                request.num_registered * self._block_size < self._config.min_written_len):
            return
        is_over = is_over or request.computed_len >= request.prompt_len > request.noted_len
        hashes, stop = request.block_hashes, request.num_registered
        index = request.noted_len // self._block_size
        while index < stop:
            if self._is_known(hashes[index]):
                index += 1
                continue
            end = index
            while end < stop and end - index < self._config.run_blocks and not self._is_known(
                    hashes[end]):
                end += 1
            if end == stop and end - index < self._config.run_blocks and not is_over:
                break
            self._append(Run(hashes=hashes[index:end], parent=hashes[index - 1] if index else b""))
            index = end
        request.noted_len = index * self._block_size

    def begin_runs(self) -> None:
        """Hold and copy the next runs, while slots are free."""
        while self._runs and len(self._active) < MAX_RUNS:
            is_tight = self._host.num_available < 2 * len(self._runs[0].hashes)
            if is_tight and (self._active or self._queue.is_waiting):
                return
            run = self._runs.popleft()
            if self._num_to_skip:
                self._num_to_skip -= 1
                self._pending.difference_update(run.hashes)
            else:
                self._begin(run)

    def take(self, job: Job, failure: str) -> None:
        """Take the end of a copy, a write or a deletion."""
        if job.kind == "drop":
            return
        run: Run = job.owner
        if job.kind == "save":
            self._pool.release(job.blocks)
            run.held = [block for block in run.held if block not in job.blocks]
            run.num_copies -= 1
            for slot, value in zip(job.slots, job.hashes, strict=True):
                self._host.fill(slot, value)
            if not run.num_copies:
                self._write(run)
            return
        self._disk.end_read(job.file)
        self._disk.remove(job.file)
        stored = self._stored(run, run.hashes)
        if failure:
            self._num_failures += 1
            self._num_to_skip = min(MAX_PAUSE, 2 ** self._num_failures)
            if failure in FULL:
                self._disk.note_full(stored.num_bytes)
        else:
            self._num_failures = 0
            self._disk.add(stored)
            self._disk.note_written(stored.num_bytes)
        self._end(run)

    def give_up(self, file: str) -> None:
        """Delete a file that turned out to be useless."""
        self._disk.remove(file)
        self._queue.push(Job(kind="drop", file=file))

    def _is_known(self, value: bytes) -> bool:
        return value in self._pending or self._disk.find(value) is not None

    def _append(self, run: Run) -> None:
        self._runs.append(run)
        self._pending.update(run.hashes)
        while len(self._pending) > self._max_pending and len(self._runs) > 1:
            self._pending.difference_update(self._runs.popleft().hashes)

    def _begin(self, run: Run) -> None:
        """Hold what is still there of a run, and order its copies to slots."""
        job, num_found = Job(kind="save", owner=run), 0
        for value in run.hashes:
            slot, block = self._host.find(value), self._pool.find(value)
            if slot is not None:
                self._host.hold(slot)
            elif block is None or (slot := self._host.take()) is None:
                break
            else:
                self._pool.acquire([block])
                run.held.append(block)
                job.blocks.append(block)
                job.slots.append(slot)
                job.hashes.append(value)
            run.slots.append(slot)
            num_found += 1
        self._pending.difference_update(run.hashes[num_found:])
        run.hashes = run.hashes[:num_found]
        self._active.append(run)
        most = self._config.copy_blocks
        for start in range(0, len(job.blocks), most):
            span = slice(start, start + most)
            self._queue.push(Job(kind="save", owner=run, blocks=job.blocks[span],
                                 slots=job.slots[span], hashes=job.hashes[span]))
            run.num_copies += 1
        if not run.num_copies:
            self._write(run)

    def _write(self, run: Run) -> None:
        """Order the file of a run whose blocks are all in slots."""
        reserved = self._stored(run, []) if run.hashes else None
        victims = self._disk.make_room(reserved.num_bytes, run.parent) if reserved else None
        if reserved is None or victims is None:
            self._end(run)
            return
        for name in victims:
            self._queue.push(Job(kind="drop", file=name))
        self._disk.add(reserved)
        self._disk.begin_read(reserved.name)
        self._queue.push(Job(kind="write", owner=run, slots=run.slots, hashes=run.hashes,
                             parents=[run.parent], file=reserved.name))

    def _stored(self, run: Run, hashes: list[bytes]) -> StoredRun:
        return StoredRun(
            name=file_name(self._key, run.hashes[-1]), key=self._key, hashes=tuple(hashes),
            parent=run.parent,
            num_bytes=max_file_bytes(len(run.hashes), self._config.block_bytes))

    def _end(self, run: Run) -> None:
        self._active.remove(run)
        self._pending.difference_update(run.hashes)
        for slot, value in zip(run.slots, run.hashes, strict=True):
            self._host.drop_hold(slot, goes_first=self._pool.knows(value))
