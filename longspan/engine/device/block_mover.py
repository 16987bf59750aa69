"""Does the copies that a scheduler orders: each once, however often it is told."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from longspan.engine.device.block_files import BlockFiles
from longspan.engine.device.block_link import CopyWatch
from longspan.engine.device.block_store import BlockStore
from longspan.engine.transfer import Transfer, TransferResult

POLL_S = 5e-4
"""Seconds between two looks at a device's copies."""


class BlockMover:
    """The copies of one runner. `start` belongs to one thread, `results` to any one.

    Args:
        files: None: there is no disk.
    """

    def __init__(self, store: BlockStore, files: BlockFiles | None) -> None:
        self._store, self._files = store, files
        self._changed = threading.Condition()
        self._copying = {kind: deque[tuple[int, CopyWatch, float]]() for kind in ("save", "load")}
        self.host_s = 0.0
        """Time of this thread that ordering copies took so far."""
        self._open: set[int] = set()
        self._ended: dict[int, TransferResult] = {}
        self._has_news = False

    def start(
        self, transfers: Sequence[Transfer], seen: Sequence[int],
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Begin copies, and forget those whose results were seen.

        Args:
            after: on GPUs, what has to be computed before blocks are copied.
        """
        with self._changed:
            for transfer_id in seen:
                self._ended.pop(transfer_id, None)
            new = [transfer for transfer in transfers if transfer.transfer_id not in self._open
                   and transfer.transfer_id not in self._ended]
        for transfer in new:
            with self._changed:
                self._open.add(transfer.transfer_id)
            if transfer.kind in ("save", "load"):
                self._copy(transfer, after)
            else:
                assert self._files is not None
                self._files.submit(transfer, self._end)

    def results(self, wait_s: float = 0.0) -> tuple[TransferResult, ...]:
        """Return everything that has ended and was not seen.

        Args:
            wait_s: longest wait for news while something is under way.
        """
        end_s = time.monotonic() + wait_s
        with self._changed:
            while True:
                self._look()
                rest_s = end_s - time.monotonic()
                if self._has_news or not self._open or rest_s <= 0:
                    self._has_news = False
                    return tuple(self._ended.values())
                is_copying = any(self._copying.values())
                self._changed.wait(min(rest_s, POLL_S) if is_copying else rest_s)

    def close(self) -> None:
        """End the threads, after the file that is being written, and give the memory back."""
        if self._files is not None:
            self._files.close()
        self._store.close()

    def _copy(self, transfer: Transfer, after: torch.cuda.Event | None) -> None:
        begun_s = time.perf_counter()
        watch = self._store.copy(transfer, after)
        called_s = time.perf_counter() - begun_s
        self.host_s += called_s
        with self._changed:
            self._copying[transfer.kind].append((transfer.transfer_id, watch, called_s))
            self._look()

    def _look(self) -> None:
        """Note the copies that are over; those of one direction end in order."""
        for copying in self._copying.values():
            while copying and copying[0][1].is_over:
                transfer_id, watch, called_s = copying.popleft()
                self._note(TransferResult(
                    transfer_id=transfer_id, elapsed_s=watch.seconds() or called_s))

    def _end(self, result: TransferResult) -> None:
        with self._changed:
            self._note(result)
            self._changed.notify_all()

    def _note(self, result: TransferResult) -> None:
        self._open.discard(result.transfer_id)
        self._ended[result.transfer_id] = result
        self._has_news = True
