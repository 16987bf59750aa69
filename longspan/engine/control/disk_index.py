"""Files of KV blocks on disk: what they hold, how much they take, which goes first. No torch.

A file holds a run of consecutive blocks of one chain. A run is worth nothing without those before
it, so whatever is used makes its ancestors younger than itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from longspan.engine.kv_file import StoredRun

GROWTH = 8
"""Behind a full disk every file that could be written is worth so much of itself in room."""


class DiskIndex:
    """What is in a folder that this engine owns.

    Args:
        runs: files found at the start, those used longest ago first. Those of other engines have
            no hashes that count here: they only take room.
        budget_bytes: most that all files may take together.
    """

    def __init__(self, runs: Iterable[StoredRun], budget_bytes: int) -> None:
        self.budget_bytes = self._room_bytes = budget_bytes
        self._runs: OrderedDict[str, StoredRun] = OrderedDict()
        self._file_of: dict[bytes, str] = {}
        self._readers: dict[str, int] = {}
        self.num_bytes = 0
        """Taken by all files, those being written included."""
        for run in runs:
            self.add(run)

    @property
    def num_known(self) -> int:
        """Blocks that can be read."""
        return len(self._file_of)

    def find(self, value: bytes) -> str | None:
        """Return the file with this content, if there is one."""
        return self._file_of.get(value)

    def add(self, run: StoredRun) -> None:
        """Take a file into the index, as the latest one used."""
        self.remove(run.name)
        self._runs[run.name] = run
        self.num_bytes += run.num_bytes
        for value in run.hashes:
            self._file_of.setdefault(value, run.name)
        self.touch(run.name)

    def remove(self, name: str) -> None:
        """Forget a file."""
        run = self._runs.pop(name, None)
        if run is None:
            return
        self.num_bytes -= run.num_bytes
        for value in run.hashes:
            if self._file_of.get(value) == name:
                del self._file_of[value]

    def touch(self, name: str) -> None:
        """Count a file as just used, and those that it continues as used after it."""
        for each in self._chain(name):
            self._runs.move_to_end(each)

    def _chain(self, name: str) -> list[str]:
        """Return a file and those that it continues, itself first."""
        found = dict[str, None]()
        while name in self._runs and name not in found:
            found[name] = None
            name = self._file_of.get(self._runs[name].parent, "")
        return list(found)

    def begin_read(self, name: str) -> None:
        """Keep a file until `end_read`."""
        self._readers[name] = self._readers.get(name, 0) + 1
        self.touch(name)

    def end_read(self, name: str) -> None:
        """Let go of a file."""
        self._readers[name] -= 1
        if not self._readers[name]:
            del self._readers[name]

    def make_room(self, num_bytes: int, parent: bytes = b"") -> list[str] | None:
        """Forget the files used longest ago until ``num_bytes`` fit; returns their names.

        None: there is no room for that many, and nothing was forgotten.

        Args:
            parent: last hash before the run that is to be written: without the files that it
                continues it would be worth nothing.
        """
        victims, room = list[str](), self._room_bytes - self.num_bytes
        kept = {*self._readers, *self._chain(self._file_of.get(parent, ""))}
        for name, run in self._runs.items():
            if room >= num_bytes:
                break
            if name not in kept:
                victims.append(name)
                room += run.num_bytes
        if room < num_bytes:
            return None
        for name in victims:
            self.remove(name)
        return victims

    def note_full(self, num_bytes: int) -> None:
        """Note that the disk had no room for a file of so many bytes: others have taken it. From
        now on old files make way for new ones, as where the budget is used up."""
        self._room_bytes = min(self.budget_bytes, max(self.num_bytes, num_bytes))

    def note_written(self, num_bytes: int) -> None:
        """Note that it had room for one: little by little up to the budget again."""
        self._room_bytes = min(self.budget_bytes, self._room_bytes + num_bytes // GROWTH)

    def check(self) -> None:
        """Recount everything. Raises AssertionError when the accounts disagree."""
        assert self.num_bytes == sum(run.num_bytes for run in self._runs.values())
        assert all(value in self._runs[name].hashes for value, name in self._file_of.items())
        assert all(count > 0 for count in self._readers.values())
