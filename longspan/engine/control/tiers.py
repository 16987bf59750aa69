"""The prefix cache's other places: host memory and disk. No torch.

One cache, three places, one key: a block's chain hash says what its content is, wherever it is. The
`BlockPool` owns what is on the device; `Tiers` owns the host's slots and the files on disk, and
orders every copy between them (`longspan.engine.transfer`). A runner only obeys.

- **To the host** goes what an allocation evicts from the device, before its blocks are written
  anew: the request that gets them waits for these copies, and nobody else. Where that request
  itself is loaded from the host, both go on in turns, and each slot that it leaves takes one of
  the blocks that make way for it: two documents change places with little room besides.
- **To disk** go the blocks of finished prefill chunks and answers, in the background
  (`longspan.engine.control.write_behind`).
- **Back** come the blocks of a prompt that is admitted, as many as are sooner copied than computed.
  The request is planned when all of them are there. If a file turns out to be damaged it goes back
  to the waiting ones, and computes what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longspan.engine.control.blocks import BlockPool
from longspan.engine.control.copy_queue import CopyQueue, Job, TierConfig
from longspan.engine.control.disk_index import DiskIndex
from longspan.engine.control.host_slots import HostSlots
from longspan.engine.control.write_behind import Run, WriteBehind
from longspan.engine.kv_file import index_of
from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.request import Request
from longspan.engine.transfer import Transfer, TransferResult

FIXED_S = 2e-3
"""Time for a copy of a single block to be ordered and reported."""
SWAP_SHARE = 8
"""Where two prompts change places, one in so many slots is free at the beginning."""
LOST_SHARE = 32
"""Or one in so many, at the price of contents, where the host has no more than one of the two."""


@dataclass(slots=True, eq=False, kw_only=True)
class Loading:
    """A request whose blocks are being copied."""

    request: Request
    stop: int
    """Leading blocks of its table that hold its prompt when all copies are done."""
    started_s: float
    num_host: int = 0
    num_disk: int = 0
    """Blocks that come from there."""
    has_failed: bool = False
    """Some file was damaged, or gone."""
    ages: dict[bytes, int] = field(default_factory=dict)
    """Place of each evicted content in the order of their last use, by hash."""
    saved: list[tuple[int, int]] = field(default_factory=list)
    """Age and slot of what is in the host by now; held until all of it is."""
    num_saves: int = 0
    """Copies to the host that have not ended."""

    def origin(self, block_size: int) -> PrefixOrigin:
        """Tell where the prefix came from, now that it is there."""
        return PrefixOrigin(
            num_host_tokens=block_size * self.num_host, num_disk_tokens=block_size * self.num_disk,
            load_s=time.monotonic() - self.started_s)


class Tiers:
    """Host memory and disk of one scheduler.

    Args:
        key: what all blocks of this engine depend on besides tokens.
        block_size: tokens in a block.
    """

    def __init__(self, config: TierConfig, pool: BlockPool, *, key: bytes, block_size: int) -> None:
        self._config, self._pool, self._block_size = config, pool, block_size
        pool.notes_evicted = config.keeps_host and config.num_slots > 0
        self.host = HostSlots(config.num_slots)
        self.disk = DiskIndex(
            index_of(Path(config.folder), key) if config.folder else (), config.disk_bytes)
        self._queue = CopyQueue(config)
        for name in self.disk.make_room(0) or ():  # the budget may have been larger before
            self._queue.push(Job(kind="drop", file=name))
        self._writer = WriteBehind(config, pool, self.host, self.disk, self._queue, key=key,
                                   block_size=block_size)
        self._loading: dict[str, Loading] = {}

    @property
    def is_idle(self) -> bool:
        """Nothing is being copied or will be."""
        return self._queue.is_idle and self._writer.is_idle

    @property
    def is_waiting(self) -> bool:
        """A runner has something to do or to report."""
        return self._queue.is_waiting

    @property
    def num_unwritten(self) -> int:
        """Blocks on their way to disk."""
        return self._writer.num_unwritten

    def place(self, value: bytes) -> str:
        """Return the fastest place that has this content; empty: none has."""
        if self._pool.knows(value):
            return "device"
        if self.host.find(value) is not None:
            return "host"
        return "disk" if self.disk.find(value) is not None else ""

    def worth_loading(
        self, hashes: Sequence[bytes], start: int, compute_s: Callable[[int], float],
        usable: Callable[[int], int],
    ) -> int:
        """Count the leading blocks to have before anything is computed, ``start`` of which are on
        the device: as many as bring the first token soonest.

        Args:
            compute_s: predicts the time to compute all blocks up to that one, from ``start`` on.
            usable: rounds a number of blocks down to one that can be reused.
        """
        if not self._config.num_slots:
            return start
        best, best_s = start, 0.0
        counts, place, end = {"device": 0, "host": 0, "disk": 0}, "", start
        while True:
            here = self.place(hashes[end]) if end < len(hashes) else ""
            if here != place and end > start:
                stop = usable(end)
                saved_s = compute_s(stop) - self._load_s(counts["host"], counts["disk"])
                if stop > start and saved_s > best_s:
                    best, best_s = stop, saved_s
            if not here:
                return best
            counts[here] += 1
            place, end = here, end + 1

    def begin(self, request: Request, known: Sequence[int], start: int) -> None:
        """Order the copies that an admitted request waits for, and set its ``num_transfers``.

        Args:
            known: for each of its leading blocks the device's block that has its content already,
                or -1 where it is to be loaded.
            start: leading blocks that are on the device anyway.
        """
        loading = Loading(request=request, stop=len(known), started_s=time.monotonic())
        loads, reads = Job(kind="load", owner=loading), dict[str, Job]()
        for index in range(start, len(known)):
            if known[index] >= 0:
                continue
            value, job = request.block_hashes[index], loads
            slot = self.host.find(value)
            if slot is None:
                file = self.disk.find(value)
                assert file is not None, "it was there a moment ago"
                job = reads.setdefault(file, Job(kind="read", owner=loading, file=file))
                loading.num_disk += 1
            else:
                self.host.hold(slot)
                job.slots.append(slot)
                loading.num_host += 1
            job.blocks.append(request.block_ids[index])
            job.hashes.append(value)
            job.parents.append(request.block_hashes[index - 1] if index else b"")
        self._change_places(loading, loads)
        for job in reads.values():
            self.disk.begin_read(job.file)
            self._push(job, self._config.run_blocks)
        if request.num_transfers:
            request.loading_len = len(known) * self._block_size
            self._loading[request.request_id] = loading

    def cancel(self, request: Request) -> None:
        """Withdraw the copies to a request that nobody wants any more, as far as they have not
        begun."""
        loading = self._loading.get(request.request_id)
        if loading is None:
            return
        for job in self._queue.withdraw(loading, ("load", "read")):
            for slot in job.slots:
                self.host.drop_hold(slot)
            if job.kind == "read":
                self.disk.end_read(job.file)
            self._end_one(loading)

    def note(self, request: Request, *, is_over: bool = False) -> None:
        """Queue the blocks that a request has registered for the disk.

        Args:
            is_over: nothing more will come.
        """
        self._writer.note(request, is_over=is_over)

    def next_transfers(self) -> tuple[tuple[Transfer, ...], tuple[int, ...]]:
        """Return the copies to begin now, and the ids whose results were taken."""
        self._writer.begin_runs()
        self._give_slots()
        return self._queue.send(), self._queue.take_seen()

    def resend(self) -> None:
        """Send everything again that is under way: some steps were given up."""
        self._queue.resend()

    def take(self, results: Sequence[TransferResult]) -> list[Loading]:
        """Take what the runner reports. Returns the requests whose copies have all ended."""
        ended = list[Loading]()
        for result in results:
            job = self._queue.take(result)
            if job is None:
                continue
            if job.kind == "load":
                self._take_load(job)
            elif job.kind == "read":
                self._take_read(job, result.failure)
            elif isinstance(job.owner, Run) or job.kind != "save":
                self._writer.take(job, result.failure)
            else:
                self._take_save(job)
            if isinstance(job.owner, Loading) and self._end_one(job.owner):
                ended.append(job.owner)
        return ended

    def held_blocks(self) -> set[int]:
        """Return the device's blocks that are kept for copies to disk."""
        return self._writer.held_blocks()

    def check(self) -> None:
        """Assert that the accounts agree."""
        self.host.check()
        self.disk.check()
        counts = dict[str, int]()
        for job in self._queue.jobs():
            if isinstance(job.owner, Loading):
                name = job.owner.request.request_id
                counts[name] = counts.get(name, 0) + 1
        assert counts == {name: item.request.num_transfers for name, item in self._loading.items()}

    # -- copies for requests -------------------------------------------------------------------

    def _load_s(self, num_host: int, num_disk: int) -> float:
        queue = self._queue
        return (FIXED_S + queue.backlog_s() + queue.seconds("load", num_host)
                + max(queue.seconds("read", num_disk), queue.seconds("load", num_disk)))

    def _push(self, job: Job, most: int) -> int:
        """Queue a job in parts of ``most`` blocks. Returns how many there are."""
        parts = list(_parts(job, most))
        for part in parts:
            self._queue.push(part)
            part.owner.request.num_transfers += 1
            if job.kind == "read" and part.blocks[0] != job.blocks[0]:
                self.disk.begin_read(job.file)
        return len(parts)

    def _change_places(self, loading: Loading, loads: Job) -> None:
        """Order the copies to the device, each part behind those out of the blocks that it writes,
        then the copies of everything else that the allocation has evicted. The end comes first: if
        slots are too few to begin with, it is an end that is lost."""
        missing = self._hold_evicted(loading, is_swap=bool(loads.blocks))
        for part in reversed([*_parts(loads, self._config.copy_blocks)]):
            self._save(loading, {block: missing.pop(block) for block in part.blocks
                                 if block in missing})
            self._push(part, len(part.blocks))
        self._save(loading, missing)  # the most valuable first: slots may not suffice for all
        self._end_saves(loading)

    def _hold_evicted(self, loading: Loading, *, is_swap: bool) -> dict[int, bytes]:
        """Hold what the host has of the evicted contents. Returns the others by their blocks, the
        most valuable first.

        Args:
            is_swap: slots are given from one copy to the next. Some must be free from the
                beginning, or each copy waits until the scheduler has heard of the one before it:
                contents that are there already are saved anew, where that costs no time, and where
                there are no such, a small end is lost.
        """
        room = lost = 0
        if is_swap:
            room = min(self.host.num_slots // SWAP_SHARE, self._queue.num_under_way("save"))
        evicted, missing = sorted(self._pool.take_evicted()), dict[int, bytes]()
        for age, (_, block, value) in reversed([*enumerate(evicted)]):
            slot, loading.ages[value] = self.host.find(value), age
            if slot is None or (self.host.num_available <= room and self.host.forget(slot)):
                missing[block] = value
            else:
                self.host.hold(slot)
                loading.saved.append((age, slot))
        if is_swap:
            lost = min(room, self.host.num_slots // LOST_SHARE) - self.host.num_available
        for block in [*missing][::-1][:max(0, lost)]:
            del missing[block]
        return missing

    def _save(self, loading: Loading, contents: dict[int, bytes]) -> None:
        """Order copies of blocks, by their ids; slots are found when their turn comes."""
        job = Job(kind="save", owner=loading, blocks=list(contents),
                  hashes=list(contents.values()))
        loading.num_saves += self._push(job, self._config.copy_blocks)

    def _take_save(self, job: Job) -> None:
        loading: Loading = job.owner
        for slot, value in zip(job.slots, job.hashes, strict=True):
            self.host.fill(slot, value)
            loading.saved.append((loading.ages[value], slot))
        loading.num_saves -= 1
        self._end_saves(loading)

    def _end_saves(self, loading: Loading) -> None:
        """Let go of what was evicted once all of it is in the host, the most valuable last."""
        if not loading.num_saves:
            for _, slot in sorted(loading.saved):
                self.host.drop_hold(slot)
            loading.saved.clear()

    def _take_load(self, job: Job) -> None:
        for block, value, parent in zip(job.blocks, job.hashes, job.parents, strict=True):
            self._pool.register(block, value, parent)
        for slot in job.slots:  # the deepest block is the first to go
            self.host.drop_hold(slot, goes_first=True)

    def _give_slots(self) -> None:
        """Find slots for what is to be saved, and for the files that are to be read next."""
        for index, job in enumerate(self._queue.waiting("copies")):
            self._take_slots(job)
            if job.is_ready:
                continue
            if index or self._queue.is_waiting:
                break  # those before it will leave theirs
            del job.blocks[len(job.slots):], job.hashes[len(job.slots):]  # these are lost
        for job in self._queue.waiting("read"):
            if self.host.num_available < len(job.blocks) - len(job.slots):
                return
            self._take_slots(job)

    def _take_slots(self, job: Job) -> None:
        while not job.is_ready and (slot := self.host.take()) is not None:
            job.slots.append(slot)

    def _take_read(self, job: Job, failure: str) -> None:
        self.disk.end_read(job.file)
        if failure:
            for slot in job.slots:
                self.host.drop_hold(slot)
            job.owner.has_failed = True
            self._writer.give_up(job.file)
            return
        for slot, value in zip(job.slots, job.hashes, strict=True):
            self.host.fill(slot, value)
        if job.owner.request.is_finished:
            for slot in job.slots:
                self.host.drop_hold(slot)
            return
        load = Job(kind="load", owner=job.owner, blocks=job.blocks, slots=job.slots,
                   hashes=job.hashes, parents=job.parents)
        self._push(load, self._config.copy_blocks)

    def _end_one(self, loading: Loading) -> bool:
        """Count one copy of a request as over; True: that was the last one."""
        request = loading.request
        request.num_transfers -= 1
        if request.num_transfers:
            return False
        del self._loading[request.request_id]
        return True


def _parts(job: Job, most: int) -> Iterator[Job]:
    for start in range(0, len(job.blocks), most):
        span = slice(start, start + most)
        yield Job(kind=job.kind, blocks=job.blocks[span], slots=job.slots[span],
                  hashes=job.hashes[span], parents=job.parents[span], file=job.file,
                  owner=job.owner)
