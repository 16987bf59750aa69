"""Copies that are waiting, and those that a runner has been told to do. No torch.

Copies between device and host keep their order, and are sent as far as they take
`TierConfig.copy_s` together, so that no step waits long behind them. Reads and writes of files have
queues of their own.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from longspan.engine.transfer import Transfer, TransferKind, TransferResult

MAX_FILES = {"read": 3, "write": 2}
"""Files that a runner has been told of at a time: of those to read one more than it reads, so that
it never waits for the next step."""
SMOOTHING = 0.3
"""Weight of the latest measurement."""
RUN_BYTES = 256 * 1024**2
"""Size of a file, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierConfig:
    """What an engine has besides its device's memory."""

    num_slots: int = 0
    """Blocks that host memory holds; 0: there are no other places."""
    keeps_host: bool = False
    """Evicted blocks go to host memory; else it is only the way to disk and back."""
    folder: str = ""
    """Directory of the files; empty: nothing goes to disk."""
    disk_bytes: int = 0
    """Most that the files may take together."""
    block_bytes: int = 1
    """Size of one block over all layers."""
    copy_bytes: int = 64 * 1024**2
    """Size of one copy between device and host, about."""
    copy_bytes_per_s: float = 2e9
    """Speed of these copies before it was measured."""
    disk_bytes_per_s: float = 1e9
    """Speed of the disk before the engine's own reads and writes have measured it."""
    copy_s: float = 0.25
    """Copies are under way for about this time at the most, seconds."""
    min_written_len: int = 2_048
    """Shorter prefixes are not written to disk, tokens."""

    @property
    def copy_blocks(self) -> int:
        """Blocks in one copy: few of all slots, for two prompts change places part by part."""
        return max(1, min(self.copy_bytes // self.block_bytes, self.num_slots // 16))

    @property
    def run_blocks(self) -> int:
        """Blocks in one file, a quarter of the slots at the most: several are on their way."""
        return max(1, min(RUN_BYTES // self.block_bytes, self.num_slots // 4))


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One copy and what it is for."""

    kind: TransferKind
    blocks: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    parents: list[bytes] = field(default_factory=list)
    """Hash of the block before each one."""
    file: str = ""
    owner: Any = None
    """Whom its end concerns."""

    @property
    def is_ready(self) -> bool:
        """It has all slots that it needs."""
        return len(self.slots) >= len(self.blocks)

    @property
    def num_blocks(self) -> int:
        """Blocks to copy; some of their slots may not be known yet."""
        return max(len(self.slots), len(self.blocks))

    def as_transfer(self, transfer_id: int) -> Transfer:
        """Return the order for a runner."""
        names = self.kind in ("read", "write")
        return Transfer(
            transfer_id=transfer_id, kind=self.kind, blocks=array("i", self.blocks),
            slots=array("i", self.slots), file=self.file,
            hashes=b"".join(self.hashes) if names else b"",
            parent=self.parents[0] if self.kind == "write" else b"")


class CopyQueue:
    """Sends jobs in order, and remembers them until their results come."""

    def __init__(self, config: TierConfig) -> None:
        self._config = config
        self._waiting: dict[str, deque[Job]] = {
            name: deque() for name in ("copies", "read", "write")}
        self._sent: dict[int, tuple[Job, Transfer]] = {}
        self._seen: list[int] = []
        self._num_sent = 0
        self._must_resend = False
        copies, disk = config.copy_bytes_per_s, config.disk_bytes_per_s
        self._rates = {"save": copies, "load": copies, "read": disk, "write": disk}

    @property
    def is_idle(self) -> bool:
        """Nothing waits, and nothing is under way."""
        return not self._sent and not any(self._waiting.values())

    @property
    def is_waiting(self) -> bool:
        """Something is under way."""
        return bool(self._sent)

    def seconds(self, kind: TransferKind, num_blocks: int) -> float:
        """Predict how long copies take."""
        return num_blocks * self._config.block_bytes / self._rates.get(kind, 1e12)

    def num_under_way(self, kind: TransferKind) -> int:
        """Predict how many blocks are copied in `TierConfig.copy_s`."""
        return math.ceil(self._config.copy_s / self.seconds(kind, 1))

    def backlog_s(self) -> float:
        """Predict how long the copies between device and host take that were not done yet."""
        return self._copying_s() + sum(
            self.seconds(job.kind, job.num_blocks) for job in self._waiting["copies"])

    def push(self, job: Job) -> None:
        """Queue a job."""
        name = {"read": "read", "write": "write", "drop": "write"}.get(job.kind, "copies")
        self._waiting[name].append(job)

    def jobs(self) -> Iterable[Job]:
        """Return all jobs whose results have not come."""
        yield from (job for job, _ in self._sent.values())
        for queue in self._waiting.values():
            yield from queue

    def withdraw(self, owner: Any, kinds: tuple[TransferKind, ...]) -> list[Job]:
        """Take back what was not sent of somebody's jobs."""
        taken = list[Job]()
        for name, queue in self._waiting.items():
            mine = [job for job in queue if job.owner is owner and job.kind in kinds]
            if mine:
                taken += mine
                self._waiting[name] = deque(job for job in queue if job not in mine)
        return taken

    def waiting(self, name: str) -> Iterable[Job]:
        """Return the jobs that were not sent yet, the next one first: ``copies``, ``read`` or
        ``write``."""
        return self._waiting[name]

    def send(self) -> tuple[Transfer, ...]:
        """Send what may be under way now; what was lost on its way is sent again."""
        transfers = [transfer for _, transfer in self._sent.values()] if self._must_resend else []
        self._must_resend = False
        copies, copying_s = self._waiting["copies"], self._copying_s()
        while copies and copies[0].is_ready and (
                not copying_s or copying_s < self._config.copy_s):
            copying_s += self.seconds(copies[0].kind, len(copies[0].slots))
            transfers.append(self._send(copies.popleft()))
        for name in ("read", "write"):
            queue = self._waiting[name]
            while queue and queue[0].is_ready and (
                    queue[0].kind == "drop" or self._num_sent_of(name) < MAX_FILES[name]):
                transfers.append(self._send(queue.popleft()))
        return tuple(transfers)

    def take_seen(self) -> tuple[int, ...]:
        """Return the ids whose results have come since the last call."""
        seen, self._seen = tuple(self._seen), []
        return seen

    def resend(self) -> None:
        """Send everything again that is under way: some of it may never have arrived."""
        self._must_resend = True

    def take(self, result: TransferResult) -> Job | None:
        """Return the job that has ended; None where that is no news."""
        self._seen.append(result.transfer_id)
        job, _ = self._sent.pop(result.transfer_id, (None, None))
        if job is not None and job.slots and result.elapsed_s > 0 and job.kind in self._rates:
            measured = len(job.slots) * self._config.block_bytes / result.elapsed_s
            self._rates[job.kind] += SMOOTHING * (measured - self._rates[job.kind])
        return job

    def _send(self, job: Job) -> Transfer:
        transfer = job.as_transfer(self._num_sent)
        self._num_sent += 1
        self._sent[transfer.transfer_id] = job, transfer
        return transfer

    def _num_sent_of(self, kind: str) -> int:
        return sum(job.kind == kind for job, _ in self._sent.values())

    def _copying_s(self) -> float:
        return sum(self.seconds(job.kind, len(job.slots)) for job, _ in self._sent.values()
                   if job.kind in ("save", "load"))
