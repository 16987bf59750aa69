"""The documents of a command: what was taken, in a table, and what was left out and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from longspan.commands.console import show_table
from longspan.documents.gather import Gathering, LeftOut

MAX_ROWS = 50
"""Where there are more files, only the longest are shown."""
MAX_NAMES = 3
"""Files named for each reason."""


def show_documents(gathering: Gathering, count: Callable[[str], int]) -> list[int]:
    """Show each document with its tokens, and what was left out, on stderr.

    Args:
        count: tokens of a text.

    Returns the tokens of each document.
    """
    counts = [count(one.text) for one in gathering.documents]
    rows = [(one.name, f"{tokens:,}")
            for one, tokens in zip(gathering.documents, counts, strict=True)]
    title = f"{len(rows):,} document{'s' if len(rows) > 1 else ''}, {sum(counts):,} tokens"
    if len(rows) > MAX_ROWS:
        longest = sorted(range(len(rows)), key=lambda index: -counts[index])[:MAX_ROWS]
        rest = sum(counts) - sum(counts[index] for index in longest)
        rows = [*(rows[index] for index in sorted(longest)),
                (f"{len(counts) - MAX_ROWS:,} shorter ones", f"{rest:,}")]
    show_table(title, ("document", "tokens"), rows, to_stderr=True)
    if gathering.left_out:
        show_table("left out", ("why", "entries", "for example"), _reasons(gathering.left_out),
                   to_stderr=True)
    return counts


def _reasons(left_out: Sequence[LeftOut]) -> list[tuple[str, str, str]]:
    names = defaultdict[str, list[str]](list)
    for one in left_out:
        names[one.reason].append(one.name)
    return [(reason, f"{len(found):,}",
             ", ".join(found[:MAX_NAMES]) + (", …" if len(found) > MAX_NAMES else ""))
            for reason, found in sorted(names.items(), key=lambda item: -len(item[1]))]
