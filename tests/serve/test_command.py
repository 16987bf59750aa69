"""`longspan serve` as a process: signals, exit status, the engine's life and death."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from longspan.cli import run_command
from longspan.engine.control.latency import Costs, Forecast
from longspan.engine.front.client import EngineStatus
from longspan.errors import LongspanError, MissingDependencyError
from longspan.serve import check_dependencies
from longspan.serve.command import listen, serve, start_up_report
from longspan.serve.config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import asyncio, sys
from tests.serve.fake import FakeEngine
from longspan.serve.command import run
from longspan.serve.config import ServeConfig

class Engine(FakeEngine):
    async def start(self):
        await super().start()
        asyncio.get_running_loop().call_later({die_after}, self.set_dead)

    def set_dead(self):
        self.set(state="dead", reason="killed by a test")

sys.exit(run(Engine({engine}), ServeConfig(port=0, {config})))
"""


@contextmanager
def process(engine: str = "", config: str = "", die_after: float = 1e6
            ) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address."""
    code = CODE.format(engine=engine, config=config, die_after=die_after)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE,
                          text=True) as child:
        assert child.stderr is not None
        try:
            line = child.stderr.readline()
            assert line.startswith("listening on http://127.0.0.1:"), line + child.stderr.read()
            yield child, line.split()[-1]
        finally:
            child.kill()


def wait_ready(url: str) -> list[str]:
    """States seen until it is ready."""
    states = list[str]()
    end_s = time.monotonic() + 30
    while time.monotonic() < end_s:
        try:
            states.append(httpx.get(url + "/health").json()["status"])
        except httpx.ConnectError:
            states.append("unreachable")
        if states[-1] == "ready":
            return states
        time.sleep(0.02)
    raise AssertionError(states)


def stream(url: str, **body: Any) -> httpx.Response:
    return httpx.post(url + "/v1/completions", timeout=20, json={
        "prompt": "x" * 50, "stream": True, "max_tokens": 20, **body})


def test_loading_serving_draining():
    with process('state="loading", load_s=2, token_s=0.05') as (child, url):
        states = wait_ready(url)
        assert "loading" in states
        body = {"prompt": "x" * 50, "stream": True, "max_tokens": 20}
        with httpx.stream("POST", url + "/v1/completions", json=body) as reply:
            child.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            refused = httpx.post(url + "/v1/completions", json={"prompt": "y"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert httpx.get(url + "/health").json()["status"] == "draining"
            assert "[DONE]" in reply.read().decode()
        assert child.wait(5) == 0
        output = child.stderr.read()
        assert "serving fake" in output and "stopped" in output and "Traceback" not in output


def test_the_engines_death_ends_everything():
    with process("token_s=0.05", die_after=1.0) as (child, url):
        wait_ready(url)
        text = stream(url, max_tokens=1000).text
        assert '"error"' in text and "died" in text and "[DONE]" not in text
        assert child.wait(8) == 1
        output = child.stderr.read()
        assert "killed by a test" in output and "Traceback" not in output


def test_a_failed_load():
    with process('state="dead", reason="no weights"') as (child, _):
        assert child.wait(5) == 1
        assert "no weights" in child.stderr.read()


@pytest.mark.parametrize(("config", "signals"), [("drain_timeout_s=0.5", 1), ("", 2)])
def test_what_does_not_end_is_cut_off(config, signals):
    with process("chunk_s=60", config) as (child, url):
        wait_ready(url)
        body = {"prompt": "x" * 50, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body):
            for _ in range(signals):
                child.send_signal(signal.SIGINT)
                time.sleep(0.3)
            assert child.wait(12) == 1


def test_kv_on_its_way_to_disk_is_written_before_the_end():
    with process("keeps_on_disk=True, num_unwritten_tokens=12_345", die_after=1e6) as (child, url):
        wait_ready(url)
        child.send_signal(signal.SIGTERM)
        assert child.stderr is not None
        line = child.stderr.readline()
        while line and not line.startswith("writing"):
            line = child.stderr.readline()
        assert "writing 12,345 tokens of KV to disk, at most 60 s" in line
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
        assert "12,345 tokens of KV are not on disk" in child.stderr.read()


def test_a_taken_port():
    with listen(ServeConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(LongspanError, match=f"port {port}: Address already in use"):
            listen(ServeConfig(port=port))


def test_the_report():
    text = start_up_report(EngineStatus(
        state="ready", model="m", max_model_len=300_000, capacity_tokens=640_000,
        ranks="4 (--cp 2 --pp 2)", memory_bytes={"weights": 5 << 30},
        prefill_chunk_len=65_536, max_num_requests=16,
        sizes_reason="more would not fit", latency=Forecast(
            costs=Costs(dense=(0.0, 1e-5, 0.0)), block_size=1, prefill_chunk_len=8192)))
    assert "300,000 tokens" in text and "640,000 tokens" in text and "5.00 GiB" in text
    assert "ranks                      4 (--cp 2 --pp 2)\n" in text
    assert "65,536 tokens" in text and "because more would not fit" in text
    assert "a guess" in text and "128K: about 1.3 s, 256K: about 2.6 s" in text
    assert "512K" not in text


@pytest.mark.parametrize(("host", "reason"), [
    ("no such host!", "Name or service not known"), (":::::", "Name or service not known"),
    ("\xfc..x", "that is no name of a host"), ("192.0.2.1", "Cannot assign requested address")])
def test_a_host_that_cannot_be_listened_on(host, reason):
    with pytest.raises(LongspanError, match=f"cannot listen on .* port 0: {reason}; choose"):
        listen(ServeConfig(host=host, port=0))


def test_a_step_of_a_server_ends():
    """Nothing is started for that: the engine's processes would take it for the default."""
    with pytest.raises(LongspanError, match="step_budget_s must be finite"):
        serve("nano", ServeConfig(port=0), {"step_budget_s": float("inf")})


@pytest.mark.parametrize("options", [
    {"port": 70_000}, {"api_keys": ("",)}, {"api_keys": ("k\n",)}, {"ping_interval_s": 0.0},
    {"host": ""}, {"model_name": ""}, {"drain_timeout_s": -1.0}, {"send_timeout_s": float("nan")},
    {"drain_timeout_s": float("nan")}])
def test_config_refuses(options):
    with pytest.raises(LongspanError):
        ServeConfig(**options)


def test_missing_packages(monkeypatch):
    monkeypatch.setattr("longspan.serve.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"fastapi.*longspan\[serve\]"):
        check_dependencies()


def test_the_subcommand(monkeypatch):
    seen = list[object]()

    def serve(*arguments: object) -> int:
        seen.extend(arguments)
        return 1

    monkeypatch.setattr("longspan.serve.command.serve", serve)
    monkeypatch.setenv("LONGSPAN_API_KEY", "one two")
    assert run_command(["serve", "nano", "--port", "0", "--max-model-len", "5",
                        "--allowed-host", "a.example", "--allowed-host", "::7"]) == 1
    model, config, options = seen
    assert model == "nano"
    assert config == ServeConfig(
        port=0, api_keys=("one", "two"), allowed_hosts=("a.example", "::7"))
    assert options["max_model_len"] == 5
