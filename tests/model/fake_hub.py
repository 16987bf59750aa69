"""A hub of one repository on this machine, which remembers what is asked of it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789" * 4
NAME = "maker/model"


@dataclass
class FakeHub:
    """Small files as they are, and large ones of which only sizes are told."""

    files: dict[str, bytes]
    sizes: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def all_sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {**{name: len(data) for name, data in self.files.items()}, **self.sizes}

    def tree(self) -> bytes:
        """As the hub lists a repository."""
        return json.dumps([{"type": "file", "path": name, "size": size, "oid": COMMIT}
                           for name, size in self.all_sizes.items()]).encode()

    def info(self) -> bytes:
        """As the hub describes a repository."""
        sizes = self.all_sizes
        return json.dumps({
            "id": NAME, "modelId": NAME, "sha": COMMIT, "private": False, "gated": False,
            "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "siblings": [{"rfilename": name, "size": size} for name, size in sizes.items()],
        }).encode()


@contextmanager
def fake_hub(files: dict[str, bytes], sizes: dict[str, int]) -> Iterator[FakeHub]:
    """Serve it until the block ends."""
    hub = FakeHub(files, sizes)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path.partition('?')[0]}")
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            if path.startswith(f"/api/models/{NAME}/tree/"):
                self.reply(hub.tree())
            elif path.startswith(f"/api/models/{NAME}"):
                self.reply(hub.info())
            elif f"/{NAME}/resolve/" in path and name in hub.files:
                self.reply(hub.files[name])
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound" if NAME not in path
                                 else "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def reply(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
