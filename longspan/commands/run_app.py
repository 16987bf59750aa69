"""Runs a command line: errors that a person can mend are one line and status 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from longspan.errors import LongspanError

# typer re-exports only the leaves of its usage errors.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def run_app(commands: typer.Typer, arguments: Sequence[str], program: str) -> int:
    """Run one of the commands of a program; returns its exit status."""
    try:
        # Without standalone mode errors come here instead of being printed as panels.
        status: Any = commands(list(arguments) or ["--help"], standalone_mode=False)
    except LongspanError as error:
        return _fail(str(error))
    except UsageError as error:
        return _fail(f"{_usage_message(error)}; see {program} --help")
    except KeyboardInterrupt:
        status = 130
    if status == 130:
        print("interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _usage_message(error: Exception) -> str:
    show = getattr(error, "format_message", None)
    return (show() if show else str(error)).rstrip(".")


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
