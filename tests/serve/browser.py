"""The page in headless Chromium, as a person uses it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_core_python.selenium import Axe

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
DESKTOP, PHONE = (1100, 800), (390, 780)
ENTER, TAB, SHIFT, ESCAPE = "\ue007", "\ue004", "\ue008", "\ue00c"
"""WebDriver's keys."""
TIMEOUT_S = 60.0
DROP = """
const data = new DataTransfer();
for (const [name, text] of arguments[0]) data.items.add(new File([text], name));
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
RECORD = """
window.sent = [];
const send = window.fetch;
window.fetch = (place, options) => {
  if (String(place).includes("chat/completions")) window.sent.push(JSON.parse(options.body));
  return send(place, options);
};
"""


@contextmanager
def open_browser() -> Iterator[Any]:
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

    def __init__(self, driver: Any, url: str, shots: Path) -> None:
        self.driver, self.url, self.shots = driver, url, shots

    def open(self, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        """On a screen of this size, with nothing kept, until the server is known to be ready."""
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": size[0], "height": size[1], "deviceScaleFactor": 1,
            "mobile": size == PHONE})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {
            "origin": self.url, "storageTypes": "all"})
        self.driver.get(self.url + "/")
        self.js("sessionStorage.clear(); localStorage.clear();")
        self.reload()

    def reload(self) -> None:
        """As a person does; what is asked from now on is in ``window.sent``."""
        self.driver.get(self.url + "/")
        self.js(RECORD)
        self.until(lambda: self.text("state") == "ready" and "up to" in self.text("model"))

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

    def call(self, module: str, code: str, *arguments: Any) -> Any:
        """What a script makes of a module of the page, ``m``, and its ``args``."""
        found = self.driver.execute_async_script(
            "const [args, done] = [[...arguments].slice(0, -1), [...arguments].at(-1)];"
            f"import('/page/{module}').then(async (m) => {{ {code} }})"
            ".then((value) => done({value}), (error) => done({error: String(error)}));",
            *arguments)
        assert "error" not in found, found["error"]
        return found.get("value")

    def all(self, selector: str) -> list[Any]:
        """Every element that fits."""
        return list(self.driver.find_elements("css selector", selector))

    def find(self, selector: str) -> Any:
        """The last element that fits."""
        return self.all(selector)[-1]

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
        self.js(DROP, [[name, text]])
        self.until(lambda: self.text("expected"))

    def drop_paths(self, *paths: Path) -> None:
        """Drag files and folders of the disk onto the page."""
        for kind in ("dragEnter", "dragOver", "drop"):
            self.driver.execute_cdp_cmd("Input.dispatchDragEvent", {
                "type": kind, "x": 300, "y": 200,
                "data": {"items": [], "files": [str(path) for path in paths],
                         "dragOperationsMask": 1}})

    def choose(self, field: str, *paths: Path) -> None:
        """Choose files, or a folder, in the browser's own window."""
        self.find(f"#{field}").send_keys("\n".join(str(path) for path in paths))

    def ask(self, question: str) -> None:
        """Type it, press Enter, until the page is at it."""
        before = self.turns
        self.keys(question, ENTER)
        self.until(lambda: self.turns == before + 1)

    @property
    def turns(self) -> int:
        """Answers begun."""
        return len(self.all(".turn.assistant"))

    def wait_idle(self) -> None:
        """Until the answer is there."""
        self.until(lambda: self.find("#ask").is_displayed())

    def facts(self) -> list[str]:
        """Beneath the last answer."""
        return [fact.text for fact in self.all(".turn:last-child .facts span")]

    def sent(self) -> list[dict[str, Any]]:
        """Requests for answers since the page was opened."""
        return list(self.js("return window.sent"))

    def state(self) -> tuple[int | None, int]:
        """Percent read, None without a bar, and length of the answer so far."""
        percent, length = self.js("""
            const bar = document.querySelector(".turn:last-child .bar");
            const text = document.querySelector(".turn:last-child .text");
            return [bar && bar.getAttribute("aria-valuenow"), text ? text.textContent.length : 0];
            """)
        return None if percent is None else int(percent), int(length)

    def check_screen(self, size: tuple[int, int]) -> None:
        """Nothing sticks out, all can be read and touched, and no rule of accessibility fails."""
        width, height = self.js("const e = document.documentElement; "
                                "return [e.scrollWidth, e.scrollHeight]")
        assert width <= size[0] and height <= size[1]
        assert not [item for item in self.js(CONTRAST) if item[0] < 4.5]
        if size == PHONE:
            assert not self.js(SMALL)
        violations = Axe().run(self.driver)["violations"]
        assert not [(one["id"], [node["html"][:200] for node in one["nodes"]])
                    for one in violations]
