"""Faults of the surroundings are one line: closed streams, terminals without characters, limits."""

from __future__ import annotations

import errno
import io
import resource
import subprocess
import sys
from typing import Any

import pytest
import typer

from longspan.commands.run_app import run_app
from longspan.errors import LongspanError
from longspan.proxies import check_proxies


def run(work: Any) -> int:
    app = typer.Typer()
    app.callback(invoke_without_command=True)(lambda: work())
    return run_app(app, ["--"], "longspan")


def raising(error: BaseException) -> Any:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(("error", "said"), [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "/out/x"), "/out/x: Permission denied"),
    (MemoryError(), "raise the limit\n")])
def test_what_the_system_refuses(
    capsys: pytest.CaptureFixture[str], error: BaseException, said: str,
) -> None:
    assert run(raising(error)) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and said in text and text.count("\n") == 1


def test_a_fault_of_ours_is_shown_unless_memory_is_limited(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError):
        run(raising(RuntimeError("ours")))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**9, 10**9))
    assert run(raising(ImportError("cannot map"))) == 2
    assert "ulimit -v" in capsys.readouterr().err


def test_a_panic_of_a_library_in_rust(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads that cannot be made under a limit of memory; it is no `Exception`."""
    panic = type("PanicException", (BaseException,), {})("cannot spawn threads")
    with pytest.raises(BaseException, match="cannot spawn"):
        run(raising(panic))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * 10**8, 8 * 10**8))
    assert run(raising(panic)) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: there is not enough memory") and text.count("\n") == 1
    assert "cannot spawn threads" in text


def test_closed_streams(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, None)
    read = list[str]()

    def work() -> None:
        read.append(sys.stdin.buffer.read().decode())
        print("said", file=sys.stderr)

    assert run(work) == 0 and read == [""]
    for stream in (sys.stdin, sys.stderr):
        stream.close()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdout", None)
    assert run(raising(AssertionError("nothing is computed"))) == 2
    assert "standard output is closed" in capsys.readouterr().err


def test_a_terminal_without_a_character_gets_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run(lambda: print("caf\xe9", flush=True)) == 0
    assert written.getvalue() == b"caf\\xe9\n"


@pytest.mark.parametrize("address", ["http://[", "http://a:b", "http://:3128", "http://x:99999999"])
def test_proxies_that_are_no_addresses(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("https_proxy", address)
    with pytest.raises(LongspanError, match="https_proxy is"):
        check_proxies()


@pytest.mark.parametrize("address", ["http://proxy:3128", "proxy.example.org:3128", "", "socks5://x"])
def test_proxies_that_are(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", address)
    check_proxies()


@pytest.mark.parametrize("is_left", [True, False])
def test_a_process_ends_with_its_status_where_a_rank_is_lost(is_left: bool) -> None:
    """Whatever libraries would do at the end: with a lost rank they wait for it, or abort."""
    begin = ("import atexit, torch.distributed as dist\n"
             "from torch._C._distributed_c10d import HashStore\n"
             "from longspan.commands.run_app import leave\n"
             "atexit.register(print, 'orderly')\n"
             "dist.init_process_group('gloo', store=HashStore(), rank=0, world_size=1)\n"
             "print('said')\n")
    end = "leave(3)" if is_left else "dist.destroy_process_group(); leave(3)"
    done = subprocess.run([sys.executable, "-c", begin + end], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout == ("said\n" if is_left else "said\norderly\n")
