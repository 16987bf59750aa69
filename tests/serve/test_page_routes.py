"""The page's files: whole, from this server alone, and behind the same key."""

from __future__ import annotations

import re
from importlib.resources import files

import httpx
import pytest

from tests.serve.fake import running

PARTS = {file.name: file.read_text(encoding="utf-8")
         for file in files("longspan.serve").joinpath("page").iterdir()}


def test_everything_that_the_page_loads_is_there() -> None:
    with running() as server:
        seen, left = set[str](), ["/"]
        while left:
            path = left.pop()
            reply = httpx.get(server.url + path)
            assert reply.status_code == 200 and "script-src 'self';" in reply.headers[
                "content-security-policy"]
            seen.add(path)
            names = re.findall(r'(?:src|href)="(page/[^"]+)"', reply.text) if path == "/" else [
                f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', reply.text)]
            left += [f"/{name}" for name in names if f"/{name}" not in seen]
            if path.endswith(".js"):
                assert reply.headers["content-type"].startswith("text/javascript")
        assert seen == {"/", *(f"/page/{name}" for name in PARTS if name != "index.html")}
        for name in ("none.js", "index.html", "..%2Fapp.py", "%2e%2e/app.py"):
            assert httpx.get(f"{server.url}/page/{name}").status_code == 404


def test_a_key_is_asked_for_every_part() -> None:
    with running(api_keys=("key",)) as server:
        for path in ("/", "/page/page.js"):
            assert httpx.get(server.url + path).status_code == 401
            assert httpx.get(server.url + path, auth=("any", "key")).status_code == 200


@pytest.mark.parametrize("name", PARTS)
def test_nothing_is_foreign_or_inline(name: str) -> None:
    """Scripts and styles stand in files of their own, so that the policy can forbid all others,
    and no text becomes elements."""
    text = PARTS[name]
    assert not re.search(r"<script(?! type=\"module\" src)|<style|\son\w+=|style=", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.findall(r"(?<!\^)https?://(?!\S*/\.test)", text.replace("https?:\\/\\/", ""))
