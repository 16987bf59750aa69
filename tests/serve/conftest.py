"""One browser for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browser import Page, open_browser
from tests.serve.nano import NanoServer, nano_server


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """A browser."""
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="session")
def page_server() -> Iterator[NanoServer]:
    """The bundled model behind the page."""
    with nano_server() as server:
        yield server


@pytest.fixture
def page(driver: Any, page_server: NanoServer, tmp_path: Path) -> Iterator[Page]:
    """Opened; afterwards nothing may have complained, and no request may be left."""
    page = Page(driver, page_server.url, tmp_path)
    page.open()
    driver.get_log("browser")
    yield page
    page_server.until(
        lambda: page_server.gauge("longspan_open_requests") == 0, "the page's requests", 20)
    assert not driver.get_log("browser")
