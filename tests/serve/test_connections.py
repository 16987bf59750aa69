"""Thousands of connections beside a running answer, and what the log says of them."""

from __future__ import annotations

import json
import logging
import re
import time
from contextlib import ExitStack

import httpx
import pytest

from longspan.errors import LongspanError
from longspan.serve.config import ServeConfig
from longspan.serve.logs import Calm, Seldom, access, set_up
from tests.serve.fake import FakeEngine, running
from tests.serve.nano import TIMEOUT_S, nano_server

MOST = 400
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (WARNING|ERROR|INFO) ")


def test_two_thousand_idle_connections_beside_an_answer() -> None:
    """The answer goes on, /health answers, old idle connections make room, the log has a line."""
    with nano_server(max_connections=MOST, access_log=True) as server, ExitStack() as stack:
        body = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "stream": True,
                "temperature": 0}
        reply = stack.enter_context(httpx.stream(
            "POST", server.url + "/v1/completions", json=body, timeout=TIMEOUT_S))
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        longest_s, num_open = 0.0, 0
        for number in range(2000):
            stack.enter_context(server.connect())
            if number % 200 == 199:
                start_s = time.monotonic()
                assert httpx.get(server.url + "/health", timeout=5).status_code == 200
                longest_s = max(longest_s, time.monotonic() - start_s)
                num_open = max(num_open, len(server.process_files()))
        assert longest_s < 2.0
        assert num_open < MOST + 200
        assert sum(line.startswith("data: {") for line in lines) > 200  # the whole answer came
        server.check()
        warnings = [line for line in server.said.splitlines() if "connections are open" in line]
        assert len(warnings) == 1 and LINE.match(warnings[0])
        assert len(server.said) < 20_000
        served = [line for line in server.said.splitlines() if "longspan.access" in line]
        assert any("GET '/health' 200" in line and "request " in line for line in served)


def test_a_full_server_of_busy_connections_refuses_by_name() -> None:
    with nano_server(max_connections=3) as server, ExitStack() as stack:
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True})
        head = ("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
                f"\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode()
        for _ in range(3):
            busy = stack.enter_context(server.connect())
            busy.sendall(head)
            assert busy.recv(1024).startswith(b"HTTP/1.1 200")
        late = stack.enter_context(server.connect())
        late.settimeout(10)
        said = b"".join(iter(lambda: late.recv(4096), b""))
        assert b" 503 " in said and b"too_many_connections" in said


def test_a_line_for_each_request_only_if_it_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    with running(FakeEngine()) as server, caplog.at_level(logging.INFO, "longspan.access"):
        reply = httpx.get(server.url + "/v1/models")
        httpx.get(server.url + "/nothing%0Ahere")
        end_s = time.monotonic() + 10  # a line is written behind its reply
        while len(lines := [record.message for record in caplog.records
                            if record.name == "longspan.access"]) < 2:
            assert time.monotonic() < end_s, lines
            time.sleep(0.01)
    first, second = lines
    assert re.fullmatch(r"127\.0\.0\.1 GET '/v1/models' 200 \d\.\d{3} s, request \w{32}", first)
    assert reply.headers["x-request-id"] in first
    assert "404" in second and "\n" not in second
    caplog.clear()
    with running(FakeEngine()) as server:
        httpx.get(server.url + "/v1/models")
    assert not caplog.records


def test_lines_of_one_kind_come_seldom(caplog: pytest.LogCaptureFixture) -> None:
    logger, seldom = logging.getLogger("longspan.test"), Seldom(0.2)
    for _ in range(5):
        seldom.warn(logger, "full: %d", 7)
    time.sleep(0.25)
    seldom.warn(logger, "full: %d", 7)
    assert [record.message for record in caplog.records] == [
        "full: 7", "full: 7 (4 more times since the last such line)"]


def test_floods_of_libraries_are_calmed() -> None:
    calm = Calm()

    def record(text: str, error: Exception | None = None) -> logging.LogRecord:
        made = logging.LogRecord("asyncio", logging.ERROR, "x", 1, text, None,
                                 (type(error), error, None) if error else None)
        return made

    full = OSError(24, "Too many open files")
    first = record("socket.accept() out of system resource\nsocket: ...", full)
    assert calm.filter(first) and first.exc_info is None
    assert first.getMessage().count("\n") == 0 and "Too many open files" in first.getMessage()
    assert not calm.filter(record("socket.accept() out of system resource\nsocket: ...", full))
    assert calm.filter(record("another thing"))


def test_the_log_is_set_up_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    logger = logging.getLogger("longspan.access")
    level, filters = logger.level, {name: list(logging.getLogger(name).filters)
                                    for name in ("asyncio", "uvicorn.error")}
    try:
        set_up(has_access_log=True)
        assert logger.isEnabledFor(logging.INFO)
        access("here", "GET '/'", 200, "id", time.monotonic())
    finally:
        logger.setLevel(level)
        for name, before in filters.items():
            logging.getLogger(name).filters = before


def test_a_limit_of_no_connections_is_refused() -> None:
    with pytest.raises(LongspanError, match="max_connections"):
        ServeConfig(max_connections=0)
