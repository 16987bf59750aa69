"""An OpenAI-compatible server that answers by a script of misfortunes, on a thread."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Read = Callable[[Any], str]
"""The answer to a prompt (token ids, or messages)."""
FAULTS = ("429", "429 date", "503", "drop", "silence", "half stream", "no finish",
          "error in stream", "broken event", "empty body")


class NastyServer:
    """Serves faults in turn, a good answer after each; counts what it was asked and answered."""

    def __init__(self, read: Read, faults: tuple[str, ...] = (), max_model_len: int | None = None,
                 cut_prompts_at: int | None = None,
                 score: Callable[[Any], list[float | None]] | None = None) -> None:
        self.score = score  # log-probabilities of a prompt that is echoed
        self.read, self.faults, self.max_model_len = read, faults, max_model_len
        self.cut_prompts_at = cut_prompts_at
        self.requests: list[dict[str, Any]] = []
        self.failed: set[str] = set()
        self.num_faults = 0
        self.answered: Counter[str] = Counter()
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    def next_fault(self, body: dict[str, Any]) -> str | None:
        """A request meets the next fault, and none when it is repeated: every other one in all, but
        with several clients in step one of them would meet nothing else."""
        with self.lock:
            key = json.dumps(body, sort_keys=True)
            self.requests.append(body)
            if not self.faults or key in self.failed:
                self.failed.discard(key)
                return None
            self.failed.add(key)
            self.num_faults += 1
            return self.faults[(self.num_faults - 1) % len(self.faults)]

    @contextmanager
    def serve(self) -> Iterator[str]:
        """The address while the server runs."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def halves(items: Any) -> tuple[Any, Any]:
    """A text or list in two."""
    return items[: len(items) // 2], items[len(items) // 2:]


def handler_of(nasty: NastyServer) -> type[BaseHTTPRequestHandler]:
    """A handler class with the server's state."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            model: dict[str, Any] = {"id": "m"}
            if nasty.max_model_len:
                model["max_model_len"] = nasty.max_model_len
            self.send_json(200, {"data": [model]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with nasty.lock:
                nasty.running += 1
                nasty.most_running = max(nasty.running, nasty.most_running)
            try:
                fault = nasty.next_fault(body)
                (self.answer if fault is None else self.fail)(body, fault)
            finally:
                with nasty.lock:
                    nasty.running -= 1

        def fail(self, body: dict[str, Any], fault: str | None) -> None:
            assert fault is not None
            if fault.startswith("429"):
                after = "7" if fault == "429" else "Wed, 21 Oct 2015 07:28:00 GMT"
                self.send_json(429, {"error": {"message": "too many"}}, {"Retry-After": after})
            elif fault.isdigit():
                self.send_json(int(fault), {"error": {"message": f"status {fault}"}})
            elif fault == "drop":
                self.close_connection = True
            elif fault == "silence":
                time.sleep(0.6)
                self.close_connection = True
            else:
                self.stream(body, fault)

        def answer(self, body: dict[str, Any], fault: str | None) -> None:
            self.stream(body, None)

        def stream(self, body: dict[str, Any], fault: str | None) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            prompt = body.get("prompt") or body["messages"]
            text = nasty.read(prompt)
            for event in self.events(body, text, fault):
                data = event if isinstance(event, str) else "data: " + json.dumps(event) + "\n\n"
                self.wfile.write(f"{len(data.encode()):x}\r\n{data}\r\n".encode())
                self.wfile.flush()
            if fault == "half stream":
                self.close_connection = True
                return
            self.wfile.write(b"0\r\n\r\n")
            if fault is None:
                with nasty.lock:
                    nasty.answered[json.dumps(prompt)] += 1

        def events(self, body: dict[str, Any], text: str, fault: str | None
                   ) -> Iterator[dict[str, Any] | str]:
            if fault == "empty body":
                return
            chat = "messages" in body
            scores = nasty.score(body["prompt"]) if nasty.score and body.get("echo") else []
            for part, found in zip(halves(text), halves(scores), strict=True):
                yield {"choices": [{"delta": {"content": part}} if chat else {
                    "text": part, "logprobs": {"token_logprobs": found} if found else None}]}
                if fault == "half stream":
                    return
                if fault == "error in stream":
                    yield {"error": {"message": "lost the GPU"}}
                    return
                if fault == "broken event":
                    yield 'data: {"choices": [{"te\n\n'
                    return
            if fault == "no finish":
                return
            yield {"choices": [{"text": "", "delta": {}, "finish_reason": "stop"}]}
            length = len(body.get("prompt", ()))
            if nasty.cut_prompts_at:
                length = min(length, nasty.cut_prompts_at)
            yield {"choices": [], "usage": {"prompt_tokens": length, "prompt_tokens_details": {
                "cached_tokens": 3}}}
            yield "data: [DONE]\n\n"

        def send_json(self, status: int, content: Any, headers: dict[str, str] | None = None
                      ) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def look_up(text: str) -> str:
    """The number that the last question of a text asks for."""
    key = re.findall(r"number for (\S+) mentioned", text)[-1]
    return re.findall(rf"numbers for {key} is: (\d+)\.", text)[0]
