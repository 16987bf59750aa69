"""What became of everything that was read: no file is left out without a word."""

from __future__ import annotations

from dataclasses import asdict, dataclass

KEPT = "kept"


@dataclass(slots=True)
class Tally:
    """One row of the table: what came from a source and had the same fate."""

    source: str
    fate: str
    """`KEPT`, or why it was left out."""
    num_files: int = 0
    num_bytes: int = 0
    num_tokens: int = 0
    """Tokens of what was kept; what is left out is not tokenised."""
    example: str = ""
    """The first one's name."""


class Intake:
    """Files (or records), bytes and tokens by source and fate."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._order: list[str] = []

    def begin(self, source: str) -> None:
        """Give a source its place in the table."""
        self._order.append(source)

    def note(
        self, source: str, fate: str, name: str, num_bytes: int, num_tokens: int = 0,
        num_files: int = 1,
    ) -> None:
        """Count files of a source that had the same fate."""
        tally = self._tallies.setdefault((source, fate), Tally(source, fate, example=name))
        tally.num_files += num_files
        tally.num_bytes += num_bytes
        tally.num_tokens += num_tokens

    def rows(self) -> list[dict[str, str | int]]:
        """Return the table as JSON has it, sources in the order they were read, what was kept
        first."""
        order = dict.fromkeys((*self._order, *(t.source for t in self._tallies.values())))
        place = {source: i for i, source in enumerate(order)}
        tallies = sorted(self._tallies.values(), key=lambda t: (
            place[t.source], t.fate != KEPT, -t.num_files, t.fate))
        return [asdict(tally) for tally in tallies]

    def left_out(self) -> str:
        """Every reason with its number of files, for an error message."""
        counts: dict[str, int] = {}
        for tally in self._tallies.values():
            if tally.fate != KEPT:
                counts[tally.fate] = counts.get(tally.fate, 0) + tally.num_files
        return ", ".join(f"{count:,} {fate}" for fate, count in counts.items()) or "nothing there"
