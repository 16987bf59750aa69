"""Runs a command line: errors that a person can mend are one line and status 2."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import resource
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from longspan.errors import LongspanError, RankLostError

# typer re-exports only the leaves of its usage errors.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
PANIC = "PanicException"
"""What libraries in Rust raise; it cannot be imported, and is no `Exception`."""
NO_MEMORY = ("there is not enough memory, or a limit on this process's memory is too low "
             "(ulimit -v); free some, or raise the limit")


def run_app(commands: typer.Typer, arguments: Sequence[str], program: str) -> int:
    """Run one of the commands of a program; returns its exit status."""
    closed = _prepare_streams()
    if closed:
        return _fail(closed)
    try:
        # Without standalone mode errors come here instead of being printed as panels.
        status: Any = commands(list(arguments) or ["--help"], standalone_mode=False)
    except LongspanError as error:
        _fail(str(error))
        return 1 if isinstance(error, RankLostError) else 2
    except UsageError as error:
        return _fail(f"{_usage_message(error)}; see {_command_of(error, program)} --help")
    except KeyboardInterrupt:
        status = 130
    except (MemoryError, RuntimeError, ImportError) as error:
        if not (isinstance(error, MemoryError) or _has_memory_limit()):
            raise
        return _fail(NO_MEMORY if not str(error) else f"{NO_MEMORY} ({error})")
    except OSError as error:
        return _fail(_system_message(error))
    except BaseException as error:
        if type(error).__name__ != PANIC or not _has_memory_limit():
            raise
        return _fail(f"{NO_MEMORY} ({error})")
    if status == 130:
        print("interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


def leave(status: int) -> NoReturn:
    """End the process.

    Where torch.distributed is still set up a rank was lost, and NCCL's threads, which wait for it,
    would have an orderly end become an abort.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _prepare_streams() -> str:
    """Make the standard streams safe to use. Returns what is wrong, where nothing would be seen.

    A terminal that cannot show a character gets its code: an answer must not be lost to that.
    """
    if sys.stderr is None:
        sys.stderr = _nothing()
    if sys.stdin is None:
        sys.stdin = _nothing()
    if sys.stdout is None:
        return "standard output is closed; let it go to a file, or to /dev/null"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    return ""


@functools.cache
def _nothing() -> io.TextIOWrapper:
    """Return a stream for a process's whole life that is empty, and takes what nobody reads."""
    return io.TextIOWrapper(io.FileIO(os.devnull, "r+"), write_through=True)


def _has_memory_limit() -> bool:
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _system_message(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}; see to it, and run again"


def _usage_message(error: Exception) -> str:
    show = getattr(error, "format_message", None)
    return (show() if show else str(error)).rstrip(".")


def _command_of(error: Exception, program: str) -> str:
    """Name the command that was asked for: it is its help that helps."""
    context = getattr(error, "ctx", None)
    if context is None:
        return program
    return program + context.command_path.removeprefix(context.find_root().command_path)


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def end_with(status: int) -> None:
    """End a command with a status other than 0."""
    if status:
        raise typer.Exit(status)
