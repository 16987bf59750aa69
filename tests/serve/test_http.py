"""Limits, refusals and rude clients, over bare connections."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from longspan.engine.control.latency import Costs, Forecast
from longspan.errors import CheckpointError
from tests.serve.fake import ANSWER, FakeEngine, Running, running, wait_for

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One for all tests that do not disturb it."""
    with running() as server:
        yield server


def post(server: Running, path: str, body: Any, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {**JSON, **options.pop("headers", {})}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=10, **options)


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error = reply.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    return error


def events(lines: Iterator[str]) -> Iterator[Any]:
    """Data of each event; comments as they are."""
    for line in lines:
        if line.startswith(":"):
            yield line
        elif line.startswith("data: {"):
            yield json.loads(line[6:])
        elif line:
            assert line == "data: [DONE]"


def send_head(server: Running, path: str, length: int, key: str = "") -> Any:
    connection = server.connect()
    connection.sendall((
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{key}"
        f"Content-Length: {length}\r\n\r\n").encode())
    return connection


def assert_alive(server: Running) -> None:
    assert httpx.get(server.url + "/health", timeout=5).json()["status"] == "ready"


# -- refusals by name --------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "change", "param"), [
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
    (CHAT, {"logit_bias": {"-5": 1}}, "logit_bias.-5"),
    (CHAT, {"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (COMPLETE, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (COMPLETE, {"prompt": "a", "presence_penalty": 2.1}, "presence_penalty"),
    (COMPLETE, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]},
     "messages.0.content.0"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    (CHAT, {"temprature": 1}, "temprature"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"temperature": "1"}, "temperature"),
    (CHAT, {"top_p": -0.1}, "top_p"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 10**6}, "n"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": 10**12}, "max_tokens"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"return_progress": True}, "return_progress"),
    (CHAT, {"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"x": ["y"]}}, "chat_template_kwargs.x"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (COMPLETE, {"prompt": ""}, "prompt"),
    (COMPLETE, {"prompt": []}, "prompt"),
    (COMPLETE, {"prompt": [-1]}, "prompt"),
    (COMPLETE, {"prompt": ["a"] * 60, "n": 2}, "n"),
    (COMPLETE, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "max_tokens": 0, "echo": True}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "max_tokens": 0, "logprobs": 1}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "max_tokens": -2, "echo": True, "logprobs": 1}, "max_tokens"),
    (CHAT, {"echo": True}, "echo"),
    (COMPLETE, {"prompt": "a", "suffix": "x"}, "suffix"),
    (COMPLETE, {"prompt": "a", "best_of": 3}, "best_of"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
    ("/sources", {"documents": [{"name": "a"}], "answer": "x"}, "documents.0.text"),
])
def test_refused_by_name(server, path, change, param):
    body = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {}
    reply = post(server, path, {**body, **change})
    assert reply.status_code == 400
    error = error_of(reply)
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None and error["param"].startswith(param)
    assert param.split(".")[0] in error["message"]


def test_null_asks_for_nothing(server):
    reply = post(server, CHAT, {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "tools": None, "stop": None, "n": None, "max_tokens": 3, "stream": False, "user": "me"})
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER[:3]


@pytest.mark.parametrize(("change", "message"), [
    ({"min_tokens": 9}, "min_tokens is 9; it must be an integer from 0 to max_tokens, which is 5"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True},
     "ignore_eos does not go with json_schema and grammar: these say where the end is"),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"description": "x" * 70_000}}}},
     "json_schema has 70019 characters; at most 65536"),
])
def test_options_that_go_together_badly(server, change, message):
    reply = post(server, CHAT, {
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 5, **change})
    assert reply.status_code == 400
    assert error_of(reply)["message"] == message


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000,
    b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}"])
def test_garbage_bodies(server, body):
    reply = post(server, COMPLETE, body)
    assert reply.status_code == 400
    assert len(error_of(reply)["message"]) < 400


def test_checkpoint_advice_fills_in(server):
    engine = FakeEngine(default_sampling={
        "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "unknown": 1.0})
    with running(engine) as advised:
        post(advised, COMPLETE, {"prompt": "x", "max_tokens": 1})
        post(advised, COMPLETE, {"prompt": "x", "max_tokens": 1, "temperature": 0, "top_k": -1,
                                 "repetition_penalty": 1})
    assert [(r.params.temperature, r.params.top_k, r.params.repetition_penalty)
            for r in engine.requests] == [(0.7, 20, 1.05), (0, 0, 1)]
    post(server, COMPLETE, {"prompt": "x", "max_tokens": 1})
    params = server.engine.requests[-1].params
    assert (params.temperature, params.repetition_penalty) == (1.0, 1.0)


# -- limits ------------------------------------------------------------------------------------


def test_body_limit_by_announcement(server):
    connection = send_head(server, COMPLETE, 10**10)
    with connection:
        assert b"413" in connection.recv(200)


def test_body_limit_while_reading():
    with running(max_body_bytes=1000) as server:
        pieces = iter([b'{"prompt": "'] + [b"x" * 400] * 100)
        reply = httpx.post(server.url + COMPLETE, content=pieces, headers=JSON, timeout=5)
        assert reply.status_code == 413
        assert error_of(reply)["code"] == "request_too_large"
        assert_alive(server)


def test_bodies_in_memory_are_bounded():
    with running(max_body_bytes=1000, max_buffered_bytes=1200) as server:
        with send_head(server, COMPLETE, 900) as first:
            first.sendall(b"x" * 899)
            time.sleep(0.1)
            reply = post(server, COMPLETE, {"prompt": "x" * 800})
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "1"


@contextmanager
def slow_prompt(server: Running) -> Iterator[None]:
    """A stream whose prompt of 900 tokens is being prefilled."""
    body = json.dumps({"prompt": "x" * 900, "stream": True})
    with httpx.stream("POST", server.url + COMPLETE, headers=JSON, timeout=5, content=body):
        wait_for(lambda: server.engine.running, "the prefill")
        yield


def test_a_full_queue_refuses_before_the_body():
    with running(FakeEngine(chunk_s=0.3), max_queued_tokens=500) as server, \
            slow_prompt(server), send_head(server, COMPLETE, 4000) as connection:
        assert b"429 Too Many" in connection.recv(300)
        assert post(server, "/tokenize", {"prompt": "abc"}).json()["count"] == 3


def test_a_full_queue_refuses_a_chunked_body_that_announced_nothing():
    with running(FakeEngine(chunk_s=0.3), max_queued_tokens=1000) as server, slow_prompt(server):
        pieces = iter([b'{"prompt": "', b"x" * 300, b'", "max_tokens": 1}'])
        reply = httpx.post(server.url + COMPLETE, content=pieces, headers=JSON, timeout=5)
        assert reply.status_code == 429 and error_of(reply)["code"] == "queue_full"
        assert post(server, COMPLETE, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_queue_length():
    with running(FakeEngine(chunk_s=0.3), max_queued_requests=1) as server, slow_prompt(server):
        reply = post(server, COMPLETE, {"prompt": "x"})
        assert reply.status_code == 429 and error_of(reply)["code"] == "queue_full"


def test_other_media_types(server):
    reply = post(server, COMPLETE, {"prompt": "x"}, headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert post(server, COMPLETE, {"prompt": "x", "max_tokens": 1},
                headers=charset).status_code == 200


def test_half_a_body():
    with running(body_timeout_s=0.3) as server, send_head(server, COMPLETE, 500) as connection:
        connection.sendall(b'{"prompt": "x')
        assert b"408" in connection.recv(300)
        assert_alive(server)


def test_hanging_up_in_the_body(server):
    gone = server.app.state.service.metrics
    before = gone.render()
    connection = send_head(server, COMPLETE, 500)
    connection.sendall(b"{")
    connection.close()
    wait_for(lambda: gone.render() != before and not server.app.state.service.gate.num_open,
             "the server to notice")
    assert_alive(server)


@pytest.mark.parametrize("size", [4, 40])
def test_ten_thousand_headers(server, size):
    connection = server.connect()
    with connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        line = b"a:" + b"b" * (size - 4) + b"\r\n"
        try:
            for _ in range(100):
                connection.sendall(line * 100)
            connection.sendall(b"\r\n")
        except OSError:
            pass  # refused before the end
        else:
            assert connection.recv(300).split(b" ")[1] in (b"400", b"431")
    assert_alive(server)


def test_garbage_on_the_socket(server):
    for data in (b"\x00\xff" * 500, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n"
                 b"Host: localhost\r\nContent-Length: -5\r\n\r\n", b"\r\n" * 2000):
        with server.connect() as connection:
            connection.sendall(data)
            connection.settimeout(0.3)
            with suppress(TimeoutError):
                assert connection.recv(100).startswith((b"HTTP/1.1 400", b""))
    assert_alive(server)


def test_unknown_routes(server):
    said = error_of(httpx.post(server.url + "/chat/completions", json={}))
    assert said["type"] == "not_found_error" and "begin with /v1" in said["message"]
    wrong = httpx.get(server.url + COMPLETE)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and error_of(wrong)


# -- keys --------------------------------------------------------------------------------------


def test_every_route_but_health_wants_the_key():
    with running(api_keys=("secret",)) as server:
        paths = httpx.get(server.url + "/openapi.json",
                          headers={"Authorization": "Bearer secret"}).json()["paths"]
        assert len(paths) >= 8
        for path in [*paths, "/openapi.json", "/nothing"]:
            status = httpx.get(server.url + path).status_code
            assert status == (200 if path == "/health" else 401), path
        basic = base64.b64encode(b"me:secret").decode()
        for value, status in [("Bearer secret", 200), ("bearer secret", 200),
                              (f"Basic {basic}", 200), ("Bearer secre", 401), ("Bearer", 401),
                              ("secret", 401), ("Basic %%%", 401), ("Basic c2VjcmV0", 401)]:
            reply = httpx.get(server.url + "/", headers={"Authorization": value})
            assert reply.status_code == status, value
        assert "Basic" in httpx.get(server.url + "/").headers["www-authenticate"]


# -- streams -----------------------------------------------------------------------------------


@pytest.mark.alone
def test_progress_and_pings():
    engine = FakeEngine(chunk_s=0.12, token_s=0.0, latency=Forecast(
        costs=Costs(dense=(0.12, 0.0, 0.0)), block_size=1, prefill_chunk_len=64))
    with running(engine, ping_interval_s=0.05) as server:
        body = {"prompt": "x" * 200, "max_tokens": 3, "stream": True, "return_progress": True}
        with httpx.stream("POST", server.url + COMPLETE, headers=JSON, timeout=5,
                          content=json.dumps(body)) as reply:
            assert 480 <= float(reply.headers["x-predicted-ttft-ms"]) < 600
            assert reply.headers["content-type"].startswith("text/event-stream")
            found = list(events(reply.iter_lines()))
    assert isinstance(found[0], dict)  # no comment before the first silence
    assert found.count(": ping") >= 4
    chunks = [item for item in found if not isinstance(item, str)]
    progress = [chunk for chunk in chunks if "prompt_progress" in chunk]
    assert all(chunk["choices"] == [] for chunk in progress)
    assert all(set(chunk["prompt_progress"]) == {"total", "cache", "processed", "time_ms"}
               for chunk in progress)
    done = [chunk["prompt_progress"]["processed"] for chunk in progress]
    assert done == sorted(done) and {0, 64, 128, 192, 200} == set(done)
    assert len(done) > 5  # signs of life that programs see
    assert all(350 < chunk["predicted_ttft_ms"] < 800 for chunk in progress)
    timings = chunks[-1]["timings"]
    assert timings["prompt_n"] == 200 and timings["predicted_n"] == 3
    assert timings["ttft_ms"] > 400 and 480 <= timings["predicted_ttft_ms"] < 600


@pytest.mark.alone
def test_headers_go_out_while_tokenising():
    with running(FakeEngine(tokenize_s=0.4), header_grace_s=0.05, ping_interval_s=0.1) as server:
        start_s = time.monotonic()
        body = json.dumps({"prompt": "x" * 5000, "stream": True})
        with httpx.stream("POST", server.url + COMPLETE, headers=JSON, content=body) as reply:
            assert time.monotonic() - start_s < 0.3
            found = list(events(reply.iter_lines()))
    assert ": ping" in found
    assert found[-1]["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["tokenize_s", "chunk_s", "token_s"])
def test_hanging_up_cancels_at_every_stage(stage, stream):
    engine = FakeEngine(**{stage: 3.0})
    with running(engine, ping_interval_s=30.0) as server:
        body = json.dumps({"prompt": "x" * 100, "stream": stream}).encode()
        connection = send_head(server, COMPLETE, len(body))
        connection.sendall(body)
        wait_for(lambda: engine.num_tokenizing or engine.running, "the request")
        time.sleep(0.05)
        connection.close()
        start_s = time.monotonic()
        wait_for(lambda: not (engine.num_tokenizing or engine.running), "the end")
        assert time.monotonic() - start_s < 1.0
        metrics = server.app.state.service.metrics
        wait_for(lambda: b"longspan_disconnects_total 1.0" in metrics.render(), "the count")
    assert len(engine.aborted) == (stage != "tokenize_s")


def test_hanging_up_cancels_all_completions():
    engine = FakeEngine(token_s=0.05)
    with running(engine) as server:
        body = json.dumps({"prompt": ["x", "y"], "n": 2, "stream": True, "max_tokens": 400})
        with httpx.stream("POST", server.url + COMPLETE, headers=JSON, content=body):
            wait_for(lambda: len(engine.running) == 4, "four completions")
        wait_for(lambda: len(engine.aborted) == 4, "four aborts")


def test_a_slow_reader_harms_nobody():
    engine = FakeEngine(max_model_len=100_000)
    with running(engine, send_timeout_s=0.5) as server:
        body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 90_000}).encode()
        connection = send_head(server, COMPLETE, len(body))
        connection.sendall(body)
        wait_for(lambda: engine.running, "the request")
        assert post(server, COMPLETE, {"prompt": "y", "max_tokens": 2}).status_code == 200
        wait_for(lambda: not engine.running, "the slow one to be cancelled", 10)
        connection.close()


def test_events_that_wait_go_out_together():
    with running(FakeEngine()) as server:
        body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 2000})
        with httpx.stream("POST", server.url + COMPLETE, headers=JSON, content=body) as reply:
            found = [item for item in events(reply.iter_lines()) if not isinstance(item, str)]
    text = "".join(chunk["choices"][0]["text"] for chunk in found)
    assert text == (ANSWER * 50)[:2000]


# -- other routes ------------------------------------------------------------------------------


def test_tokenize_and_back(server):
    reply = post(server, "/tokenize", {"prompt": "abc"}).json()
    assert (reply["count"], reply["tokens"], reply["max_model_len"]) == (3, [97, 98, 99], 4096)
    chat = post(server, "/tokenize", {"messages": [{"role": "user", "content": "x"}],
                                      "return_tokens": False}).json()
    assert chat["count"] == len("<user>x<assistant>") and "tokens" not in chat
    back = post(server, "/detokenize", {"tokens": [97, 98, 99]})
    assert back.json() == {"prompt": "abc"}
    assert post(server, "/detokenize", {"tokens": [2**31 - 1]}).status_code == 400


def test_sources_of_an_answer(server):
    documents = [{"name": "a.txt", "text": "The mill opened in 1931."},
                 {"name": "b.txt", "text": "The mill closed in 1975.\nIt is a museum."}]
    reply = post(server, "/sources", {
        "documents": documents, "answer": "In 1975.", "question": "When did it close?"}).json()
    assert reply == {"sources": [{
        "name": "b.txt", "start": 16, "stop": 27, "line": 1, "quote": "in 1975. It",
        "share": 1.0, "is_asked": False}]}
    none = post(server, "/sources", {"documents": documents, "answer": "Zebulon Quatermain."})
    assert none.json() == {"sources": []}


def test_many_tokens_come_in_pieces(server):
    text = "x" * 50_000
    reply = post(server, "/tokenize", {"prompt": text}).json()
    assert reply["count"] == 50_000 and reply["tokens"] == [120] * 50_000


def test_developer_is_system(server):
    post(server, CHAT, {"max_tokens": 1, "messages": [
        {"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]})
    prompt = "".join(map(chr, server.engine.requests[-1].prompt))
    assert prompt == "<system>a<user>b<assistant>"


def test_health_of_each_state():
    engine = FakeEngine()
    with running(engine) as server:
        for state, status in [("loading", 503), ("ready", 200), ("draining", 503), ("dead", 503)]:
            engine.set(state=state, reason="why")
            reply = httpx.get(server.url + "/health")
            assert (reply.status_code, reply.json()) == (status, {"status": state,
                                                                  "reason": "why"})


def test_metrics():
    with running(FakeEngine(chunk_s=0.01)) as server:
        for _ in range(2):
            post(server, COMPLETE, {"prompt": "x" * 100, "max_tokens": 5})
        post(server, COMPLETE, {"prompt": 5})
        text = httpx.get(server.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values["longspan_prompt_tokens_total"]) == 200
    assert float(values["longspan_cached_tokens_total"]) == 96
    assert float(values["longspan_completion_tokens_total"]) == 10
    assert float(values["longspan_ttft_seconds_count"]) == 2
    assert float(values["longspan_tpot_seconds_count"]) == 2
    assert float(values['longspan_state{state="ready"}']) == 1
    assert float(values["longspan_queued_tokens"]) == 0
    route = '{route="/v1/completions",status="%d"}'
    assert float(values["longspan_requests_total" + route % 200]) == 2
    assert float(values["longspan_requests_total" + route % 400]) == 1
    assert "longspan_event_loop_lag_seconds_bucket" in text


def test_the_page(server):
    reply = httpx.get(server.url + "/")
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "http://" not in reply.text and "https://" not in reply.text


def test_an_unexpected_failure_is_a_500_in_the_same_shape(server, monkeypatch, caplog):
    async def fail(*args: Any, **options: Any) -> str:
        raise RuntimeError("private detail")

    for name in ("detokenize", "encode_chat", "add"):
        monkeypatch.setattr(server.engine, name, fail)
    before = httpx.get(server.url + "/metrics").text
    bodies = {"/detokenize": {"tokens": [1]}, COMPLETE: {"prompt": "x"},
              CHAT: {"messages": [{"role": "user", "content": "x"}]}}
    with httpx.Client(base_url=server.url, headers=JSON) as client:
        for path, body in bodies.items():
            reply = client.post(path, content=json.dumps(body))
            assert reply.status_code == 500
            assert "private" not in reply.text and error_of(reply)["type"] == "server_error"
            request_id = reply.headers["x-request-id"]
            assert request_id in error_of(reply)["message"]
            assert any(request_id in record.message for record in caplog.records)
            assert "close" not in reply.headers.get("connection", "")
        assert client.get("/health").status_code == 200  # on the same connection
    after = httpx.get(server.url + "/metrics").text
    for path in bodies:
        line = f'longspan_requests_total{{route="{path}",status="500"}}'
        assert line not in before and f"{line} 1.0" in after
    with httpx.stream("POST", server.url + COMPLETE, headers=JSON, timeout=5,
                      content=json.dumps({"prompt": "x", "stream": True})) as reply:
        assert reply.status_code == 500 and reply.headers["x-request-id"]


def test_a_failure_amid_a_stream_names_the_request(caplog):
    engine = FakeEngine()

    async def fail(*args: Any, **options: Any) -> str:
        await asyncio.sleep(0.1)
        raise RuntimeError("private detail")

    engine.tokenize = fail  # type: ignore[assignment]
    with running(engine, header_grace_s=0.01) as server, \
            httpx.stream("POST", server.url + COMPLETE, headers=JSON, timeout=5,
                         content=json.dumps({"prompt": "x", "stream": True})) as reply:
        (event,) = events(reply.iter_lines())
        assert reply.headers["x-request-id"] in event["error"]["message"]
        assert "private" not in str(event)


def test_what_is_wrong_with_the_checkpoint_is_not_for_clients(monkeypatch, server, caplog):
    async def fail(*args: Any, **options: Any) -> str:
        raise CheckpointError("/srv/models/secret: no such file")

    monkeypatch.setattr(server.engine, "encode_chat", fail)
    reply = post(server, CHAT, {"messages": [{"role": "user", "content": "x"}]})
    assert reply.status_code == 500 and "/srv" not in reply.text
    assert any("/srv" in str(record.exc_info) for record in caplog.records)


def test_template_values_of_any_name(server):
    for name in ("self", "messages_", "text", "loop", "kwargs", "request"):
        reply = post(server, CHAT, {"messages": [{"role": "user", "content": "x"}],
                                    "max_tokens": 1, "chat_template_kwargs": {name: True}})
        assert reply.status_code == 200, name
    for name in ("messages", "tools", "eos_token", "add_special_tokens"):
        reply = post(server, CHAT, {"messages": [{"role": "user", "content": "x"}],
                                    "max_tokens": 1, "chat_template_kwargs": {name: True}})
        assert reply.status_code == 400 and name in error_of(reply)["message"]


def test_streams_for_readers_that_go_line_by_line():
    """Each event is one line and a blank one; comments have no blank line of their own."""
    with running(FakeEngine(chunk_s=0.1), ping_interval_s=0.03) as server, \
            httpx.stream("POST", server.url + COMPLETE, headers=JSON, timeout=5, content=json.dumps(
                {"prompt": "x" * 70, "max_tokens": 3, "stream": True})) as reply:
        text = reply.read().decode()
    assert text.startswith((": ping\n", "data: "))
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    for block in blocks:
        *comments, data = block.split("\n")
        assert data.startswith("data: ") and set(comments) <= {": ping"}
