"""The bundled model behind `longspan serve`'s own code, as a process with three parts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0
CODE = """
import json, sys
from longspan.serve.command import serve
from longspan.serve.config import ServeConfig
config, options = map(json.loads, sys.argv[1:])
sys.exit(serve("nano", ServeConfig(port=0, **config), options))
"""
ENGINE = {"device": "cpu", "num_threads": 1, "max_model_len": 32_768, "step_budget_s": 0.2}
QUESTION = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


class NanoServer:
    """A server process; what it says is in ``log``, what it writes to disk in ``directory``."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self.directory, self.log = directory / "tmp", directory / "log"
        self.directory.mkdir()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, json.dumps(config), json.dumps(ENGINE)], cwd=ROOT,
                stderr=log, env={**os.environ, "TMPDIR": str(self.directory)})
        self.children = dict[str, psutil.Process]()

    def wait_ready(self) -> None:
        """Until it has measured its speed; then it is asked for the answer to `QUESTION`."""
        self.until(lambda: "serving nano" in self.said, "the start-up report")
        self.url = self.said.splitlines()[0].split()[-1]
        self.port = int(self.url.rpartition(":")[2])
        self.children = {child.cmdline()[-1].removeprefix("longspan-"): child
                         for child in psutil.Process(self.process.pid).children(recursive=True)}
        assert set(self.children) == {"scheduler", "runner"}
        self.answer = self.ask()

    @property
    def said(self) -> str:
        """Standard error so far."""
        return self.log.read_text()

    def ask(self) -> str:
        """The text for `QUESTION`."""
        reply = httpx.post(self.url + "/v1/completions", json=QUESTION, timeout=TIMEOUT_S)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    def check(self) -> None:
        """It answers as it did when nobody disturbed it."""
        assert self.ask() == self.answer
        assert self.state == "ready"

    @property
    def state(self) -> str:
        """As the health check tells it."""
        return str(httpx.get(self.url + "/health").json()["status"])

    def gauge(self, name: str) -> float:
        """The value of one metric without labels."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))

    def process_files(self) -> list[object]:
        """Sockets and files that the front end has open."""
        return list(range(psutil.Process(self.process.pid).num_fds()))

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Poll."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s, f"waited {timeout_s} s for {what}: {self.said}"
            assert self.process.poll() is None, self.said
            time.sleep(0.02)

    def end(self, within_s: float) -> int:
        """The exit status. Nothing is left: no process, no file; and no traceback was printed."""
        status = self.process.wait(within_s)
        _, alive = psutil.wait_procs(list(self.children.values()), 3)
        assert not alive
        assert not list(self.directory.iterdir())
        assert "Traceback" not in self.said, self.said
        return status


@contextmanager
def nano_server(**config: Any) -> Iterator[NanoServer]:
    """A ready server, killed at the end if it still runs."""
    directory = Path(tempfile.mkdtemp(prefix="nano-"))  # a short path: it holds sockets
    server = NanoServer(directory, **config)
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        psutil.wait_procs(list(server.children.values()), 3)
        shutil.rmtree(directory)
