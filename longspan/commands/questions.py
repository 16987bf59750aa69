"""Questions that are typed, or come by lines on standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from longspan.errors import LongspanError
from longspan.text_files import STANDARD_INPUT

PROMPT = "> "


def is_at_terminal() -> bool:
    """Whether a person types the questions."""
    return sys.stdin is not None and sys.stdin.isatty()


def check_input(is_taken: bool) -> None:
    """Raise `LongspanError` where no question can come from standard input.

    Args:
        is_taken: it is the document.
    """
    # a closed standard input was replaced by the null device when the command began
    is_missing = (sys.stdin is None or sys.stdin.closed
                  or getattr(sys.stdin, "name", None) == os.devnull)
    if is_missing or is_taken:
        raise LongspanError("there is nothing to ask: give --question, or type questions on "
                            "standard input")


def read_questions() -> Iterator[str]:
    """Yield one question a line until the input ends; at a terminal with a prompt."""
    if is_at_terminal():
        import readline  # noqa: F401, lines can then be edited

        print("One question a line; they follow each other. End with Ctrl-D.", file=sys.stderr)
    while True:
        try:
            line = input(PROMPT) if is_at_terminal() else input()
        except EOFError:
            if is_at_terminal():
                print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            raise LongspanError(
                f"{STANDARD_INPUT}: not UTF-8 text (byte 0x{error.object[error.start]:02x})"
            ) from None
        if line.strip():
            yield line.strip()
