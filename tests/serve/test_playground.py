"""The playground in headless Chromium, against the bundled model: `make test-browser`."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.nano import NanoServer, nano_server

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
DESKTOP, PHONE = (1100, 800), (390, 780)
ENTER, TAB, SHIFT, ESCAPE = "\ue007", "\ue004", "\ue008", "\ue00c"
"""WebDriver's keys."""
TIMEOUT_S = 60.0
TEXT = "".join(f"On day {day} the crew of the Ada saw {day * 7 % 91} whales.\n"
               for day in range(120))
DROP = """
const data = new DataTransfer();
data.items.add(new File([arguments[0]], arguments[1], {type: "text/plain"}));
for (const kind of ["dragenter", "dragover", "drop"])
  document.querySelector("main").dispatchEvent(
    new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
"""
CONTRAST = """
const rgb = (text) => text.match(/[0-9.]+/g).map(Number);
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= .04045 ? v / 12.92
    : ((v + .055) / 1.055) ** 2.4);
  return .2126 * x + .7152 * y + .0722 * z;
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const color = rgb(getComputedStyle(node).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const found = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
  if (!own || !node.checkVisibility() || node.disabled || node.matches("script, .hidden")) continue;
  const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
  found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.textContent.slice(0, 40)]);
}
return found;
"""
SMALL = """
return [...document.querySelectorAll("button, textarea, summary, input:not(.hidden)")]
  .filter((node) => node.checkVisibility())
  .map((node) => [node.id || node.textContent, node.getBoundingClientRect().height])
  .filter(([, height]) => height < 44);
"""


@pytest.fixture(scope="module")
def server() -> Iterator[NanoServer]:
    with nano_server() as server:
        yield server


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """A browser; it is a failure, not a skip, if this machine has none."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    control = shutil.which("chromedriver")
    assert browser and control, "install chromium and chromedriver to run the browser tests"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(control))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page as a person uses it. ``shots``: where pictures of it go."""

    def __init__(self, driver: Any, server: NanoServer, shots: Path) -> None:
        self.driver, self.server, self.shots = driver, server, shots

    def open(self, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        """On a screen of this size, until the server is known to be ready."""
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": size[0], "height": size[1], "deviceScaleFactor": 1,
            "mobile": size == PHONE})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self.driver.get(self.server.url + "/")
        self.until(lambda: self.text("state") == "ready" and "nano" in self.text("model"))

    def until(self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
        """Poll."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s, self.shot("timeout")
            time.sleep(0.02)

    def shot(self, name: str) -> str:
        """A picture."""
        path = str(self.shots / f"{name}.png")
        self.driver.save_screenshot(path)
        return path

    def js(self, code: str, *arguments: Any) -> Any:
        """What the script returns."""
        return self.driver.execute_script(code, *arguments)

    def find(self, selector: str) -> Any:
        """The last element that fits."""
        return self.driver.find_elements("css selector", selector)[-1]

    def text(self, name: str) -> str:
        """What an element shows."""
        return str(self.find(f"#{name}").text)

    def keys(self, *keys: str) -> None:
        """Pressed wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def back(self) -> None:
        """Shift and Tab."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).key_down(SHIFT).send_keys(TAB).key_up(SHIFT).perform()

    def focus(self) -> str:
        """Id of the element with the focus, or its name."""
        return str(self.js("const e = document.activeElement; return e.id || e.tagName;"))

    def drop(self, text: str, name: str = "log.txt") -> None:
        """Drag a file onto the page; until its tokens are counted."""
        self.js(DROP, text, name)
        self.until(lambda: self.text("expected"))

    def ask(self, question: str) -> None:
        """Type it, press Enter, until the page is at it."""
        before = self.turns
        self.keys(question, ENTER)
        self.until(lambda: self.turns == before + 1)

    @property
    def turns(self) -> int:
        """Answers begun."""
        return len(self.driver.find_elements("css selector", ".turn.assistant"))

    def wait_idle(self) -> None:
        """Until the answer is there."""
        self.until(lambda: self.find("#ask").is_displayed())

    def facts(self) -> list[str]:
        """Beneath the last answer."""
        return [fact.text for fact in self.driver.find_elements(
            "css selector", ".turn:last-child .facts span")]

    def state(self) -> tuple[int | None, int]:
        """Percent read, None without a bar, and length of the answer so far."""
        percent, length = self.js("""
            const bar = document.querySelector(".turn:last-child .bar");
            const text = document.querySelector(".turn:last-child .text");
            return [bar && bar.getAttribute("aria-valuenow"), text.textContent.length];""")
        return None if percent is None else int(percent), int(length)


@pytest.fixture
def page(driver: Any, server: NanoServer, tmp_path: Path) -> Iterator[Page]:
    """Opened; afterwards nothing may have complained, and no request may be left."""
    page = Page(driver, server, tmp_path)
    page.open()
    yield page
    server.until(lambda: server.gauge("longspan_open_requests") == 0, "the page's requests", 20)
    assert not driver.get_log("browser")


def count_tokens(server: NanoServer, text: str) -> int:
    return int(httpx.post(server.url + "/tokenize", json={"prompt": text}).json()["count"])


def number(text: str) -> int:
    """The first number, commas and all."""
    return int(re.search(r"[\d,]+", text)[0].replace(",", ""))


def test_a_document_from_drop_to_follow_up(page: Page) -> None:
    page.shot("empty")
    page.drop(TEXT)
    count = count_tokens(page.server, TEXT)
    assert page.text("count") == f"{count:,} tokens" and page.text("name") == "log.txt"
    assert page.text("expected").startswith("first answer in about ")
    page.keys("How many whales?")
    page.until(lambda: "first token in about" in page.text("live"))
    assert number(page.text("live")) > count
    page.shot("document")
    page.js("document.querySelector('#max').value = 60")
    page.ask("")
    seen = list[tuple[int | None, int]]()
    assert page.find("#stop").is_displayed()
    while not page.find("#ask").is_displayed():
        seen.append(page.state())
        if len(seen) == 15:
            page.shot("reading")
    percents = [percent for percent, _ in seen if percent is not None]
    assert percents == sorted(percents) and len(set(percents)) > 3
    lengths = [length for _, length in seen]
    assert lengths == sorted(lengths) and len(set(lengths)) > 3  # it came in pieces
    assert not page.driver.find_elements("css selector", ".bar")
    first = page.facts()
    assert any(re.match(r"first token .+, predicted .+", fact) for fact in first)
    assert count < number(next(fact for fact in first if "prompt tokens" in fact)) < count + 60
    page.ask("And which day had most?")
    page.wait_idle()
    page.until(lambda: "in the cache" in page.text("live"))
    page.shot("follow-up")
    cached = next(fact for fact in page.facts() if "from the prefix cache" in fact)
    assert count - 32 <= number(cached)
    assert page.turns == 2


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop(page: Page, way: str) -> None:
    page.drop(TEXT * 5)
    page.ask("Who?")
    page.until(lambda: page.state()[0])  # it reads
    page.keys(ESCAPE) if way == "escape" else page.find("#stop").click()
    page.wait_idle()
    assert "stopped" in page.facts()
    page.server.until(
        lambda: page.server.gauge("longspan_open_requests") == 0, "the cancelled request", 5)
    assert page.find("#question").get_attribute("value") == "Who?"  # to be asked again
    assert page.focus() == "question"
    page.shot(f"stopped by {way}")


def test_keyboard_alone(page: Page) -> None:
    assert page.focus() == "question"
    page.keys("Hello")
    order = list[str]()
    for more in ("", ENTER, ""):  # Enter opens the options
        page.keys(TAB)
        order.append(page.focus())
        page.keys(more)
    assert order == ["ask", "SUMMARY", "temperature"]
    page.keys(TAB)
    assert page.focus() == "max"
    page.keys("5")  # a field that is entered is selected
    assert page.find("#max").get_attribute("value") == "5"
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.shot("options")
    for _ in range(4):
        page.back()
    assert page.focus() == "question"
    page.keys(ENTER)
    page.until(lambda: page.facts())
    assert "5 answer tokens" in page.facts() and "cut at the longest answer" in page.facts()
    assert page.focus() == "question"
    page.back()
    assert page.focus() == "choose"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_screen(page: Page, size: tuple[int, int], scheme: str) -> None:
    """Nothing sticks out, what is touched is large enough, and every text can be read."""
    page.open(size, scheme)
    page.shot(f"{scheme} {size[0]} empty")
    check_screen(page, size)
    page.drop(TEXT[:2000], "a-very-long-name-of-a-file-from-some-archive-" * 3 + ".txt")
    page.find("summary").click()
    page.find("#max").clear()
    page.find("#max").send_keys("12")
    page.find("#question").click()
    page.ask("A rather long question, to see how it wraps: who saw how many whales, and when?")
    check_screen(page, size)
    page.wait_idle()
    page.until(lambda: "in the cache" in page.text("live"))
    page.shot(f"{scheme} {size[0]} answered")
    check_screen(page, size)


def check_screen(page: Page, size: tuple[int, int]) -> None:
    width, height = page.js("const e = document.documentElement; "
                            "return [e.scrollWidth, e.scrollHeight]")
    assert width <= size[0] and height <= size[1]
    faint = [item for item in page.js(CONTRAST) if item[0] < 4.5]
    assert not faint
    if size == PHONE:
        assert not page.js(SMALL)


def test_what_cannot_be_read(page: Page) -> None:
    page.drop(TEXT * 16, "long.txt")
    assert page.text("expected") == "too long: the limit is 32,768 tokens"
    page.shot("too long")
    page.find("#remove").click()
    assert page.focus() == "choose" and not page.find("#document").is_displayed()
    page.js(DROP, "\0" * 50, "photo.jpg")
    page.until(lambda: "photo.jpg is not a text file" in page.text("log"))
    page.shot("no text")
