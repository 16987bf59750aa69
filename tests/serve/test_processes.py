"""The server in front of an engine in processes: kills, signals, failed loads. The runner's process
computes a fake model."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.engine.processes.far_runner import LOADER, write_model

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 30
CODE = """
import sys
from longspan.config import EngineConfig
from longspan.engine.front.client import AsyncEngine
from longspan.engine.processes.launch import in_processes
from longspan.serve.command import run
from longspan.serve.config import ServeConfig

engine = AsyncEngine(EngineConfig(model={path!r}), in_processes(loader={loader!r}))
sys.exit(run(engine, ServeConfig(port=0)))
"""
BODY = {"prompt": [5] * 40, "max_tokens": 20, "stream": True, "ignore_eos": True}


class Server:
    """A server process, its address and its children."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE.format(path=str(path), loader=LOADER)], cwd=ROOT,
            stderr=subprocess.PIPE, text=True)
        self.children = dict[str, psutil.Process]()

    def wait_ready(self) -> None:
        """Until it answers."""
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().split()[-1]
        self.until(lambda: self.state() == "ready")
        self.children = {child.cmdline()[-1].removeprefix("longspan-"): child
                         for child in psutil.Process(self.process.pid).children()}

    def state(self) -> str:
        """As the health check tells it."""
        return str(httpx.get(self.url + "/health").json()["status"])

    def until(self, condition: object) -> None:
        """Poll."""
        end_s = time.monotonic() + TIMEOUT_S
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < end_s and self.process.poll() is None
            time.sleep(0.01)

    def end(self, within_s: float) -> tuple[int, str]:
        """Exit status and the rest of what it said; no child is left."""
        status = self.process.wait(within_s)
        assert self.process.stderr is not None
        _, alive = psutil.wait_procs(list(self.children.values()), 3)
        assert not alive
        return status, self.process.stderr.read()


@contextmanager
def served(path: Path) -> Iterator[Server]:
    server = Server(write_model(path))
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        assert server.process.stderr is not None
        server.process.stderr.close()


@pytest.mark.parametrize("role", ["runner", "scheduler"])
def test_a_killed_child_ends_streams_and_server(tmp_path: Path, role: str) -> None:
    with served(tmp_path) as server:
        (tmp_path / "hold").touch()
        with httpx.stream("POST", server.url + "/v1/completions", json=BODY,
                          timeout=TIMEOUT_S) as reply:
            server.until(lambda: (tmp_path / "steps.log").exists())
            server.children[role].kill()
            text = reply.read().decode()
        assert f"the {role} process was killed by SIGKILL" in text and "[DONE]" not in text
        status, said = server.end(8)
        assert status == 1 and "Traceback" not in said
        assert f"error: the engine has stopped: the {role} process was killed" in said


def test_the_first_signal_drains(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        (tmp_path / "hold").touch()
        with httpx.stream("POST", server.url + "/v1/completions", json=BODY,
                          timeout=TIMEOUT_S) as reply:
            server.until(lambda: (tmp_path / "steps.log").exists())
            for process in (server.process, *server.children.values()):
                process.send_signal(signal.SIGTERM)  # as a service manager does
            server.until(lambda: server.state() == "draining")
            (tmp_path / "hold").unlink()
            text = reply.read().decode()
        assert '"finish_reason":"length"' in text and "[DONE]" in text
        status, said = server.end(8)
        assert status == 0 and said.rstrip().endswith("stopped") and "Traceback" not in said


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        (tmp_path / "hold").touch()
        with httpx.stream("POST", server.url + "/v1/completions", json=BODY,
                          timeout=TIMEOUT_S):
            server.until(lambda: (tmp_path / "steps.log").exists())
            server.process.send_signal(signal.SIGINT)
            server.until(lambda: server.state() == "draining")
            begin_s = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            status, said = server.end(5)
        assert status == 1 and time.monotonic() - begin_s < 4
        assert "1 requests were cut off" in said and "Traceback" not in said


def test_a_failed_load_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "longspan.cli", "serve", str(tmp_path / "none"), "--port", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=2 * TIMEOUT_S, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert re.search("no such directory; name a directory, a hub id", lines[1])
