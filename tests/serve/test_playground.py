"""The page in headless Chromium, against the bundled model: `make test-browser`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from longspan.documents.gather import gather
from tests.serve.browser import DESKTOP, ENTER, ESCAPE, PHONE, TAB, Page
from tests.serve.fake import running

pytestmark = pytest.mark.browser
TEXT = "".join(f"On day {day} the crew of the Ada saw {day * 7 % 91} whales.\n"
               for day in range(120))


def count_tokens(page: Page, text: str) -> int:
    return int(httpx.post(page.url + "/tokenize", json={"prompt": text}).json()["count"])


def number(text: str) -> int:
    """The first number, commas and all."""
    return int(re.search(r"[\d,]+", text)[0].replace(",", ""))


def set_option(page: Page, name: str, value: str) -> None:
    page.js("const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('change'));", name, value)


def test_a_file_from_drop_to_follow_up(page: Page) -> None:
    page.shot("empty")
    page.drop(TEXT)
    count = count_tokens(page, f"===== log.txt =====\n{TEXT.rstrip()}")
    assert page.text("count") == f"1 file, {count:,} tokens"
    assert "log.txt" in page.text("chips")
    assert page.text("expected").startswith("first answer in about ")
    page.keys("How many whales?")
    page.until(lambda: "first token in about" in page.text("live"))
    page.until(lambda: number(page.text("live")) > count)  # the question is counted too
    page.shot("document")
    set_option(page, "max", "60")
    page.ask("")
    seen = list[tuple[int | None, int]]()
    assert page.find("#stop").is_displayed()
    while not page.find("#ask").is_displayed():
        seen.append(page.state())
        if len(seen) == 15:
            page.shot("reading")
    percents = [percent for percent, _ in seen if percent is not None]
    assert percents == sorted(percents) and len(set(percents)) > 3
    assert len({length for _, length in seen}) > 3  # it came in pieces
    assert not page.all(".bar")
    first = page.facts()
    assert any(re.match(r"first token .+, predicted .+", fact) for fact in first)
    assert count < number(next(fact for fact in first if "prompt tokens" in fact)) < count + 60
    page.ask("And which day had most?")
    page.wait_idle()
    page.until(lambda: "are in the cache" in page.text("live"))
    page.shot("follow-up")
    cached = next(fact for fact in page.facts() if "from the prefix cache" in fact)
    assert count - 32 <= number(cached)
    asked = page.sent()[1]["messages"]
    assert [message["role"] for message in asked] == ["user", "assistant", "user"]
    assert asked[0]["content"] == f"===== log.txt =====\n{TEXT.rstrip()}\n\nHow many whales?"
    assert asked[2]["content"] == "And which day had most?"


def test_an_answer_shows_the_file_that_it_stands_in(page: Page) -> None:
    """Found by its words; a reload shows it again."""
    fact = "One of the special magic numbers for grey-owl is: 5550123."
    page.drop(f"{TEXT[:400]}\n\n{fact}\n\n{TEXT[400:800]}", "owls.txt")
    page.drop(TEXT[:500], "whales.txt")
    page.ask("What is the special magic number for grey-owl mentioned in the provided text? "
             "Answer with the number only.")
    page.wait_idle()
    page.until(lambda: page.all(".sources details"))
    for _ in range(2):
        (source,) = page.all(".sources details")
        assert source.text == "From owls.txt, line 12"
        source.find_element("css selector", "summary").click()
        assert "5550123" in source.find_element("css selector", "blockquote").text
        page.shot("sources")
        page.reload()
        page.until(lambda: page.all(".sources details"))


def test_a_file_dropped_later_goes_with_the_next_question(page: Page) -> None:
    """The conversation before it stays."""
    set_option(page, "max", "4")
    page.drop("One.", "a.txt")
    page.ask("First?")
    page.wait_idle()
    page.drop("Two.", "a.txt")
    assert page.turns == 1 and "a.txt (2)" in page.text("chips")
    page.ask("Second?")
    page.wait_idle()
    contents = [message["content"] for message in page.sent()[1]["messages"]]
    assert contents[0] == "===== a.txt =====\nOne.\n\nFirst?"
    assert contents[2] == "===== a.txt (2) =====\nTwo.\n\nSecond?"


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopped_before_the_answer_begins(page: Page, way: str) -> None:
    page.drop(TEXT * 5)
    page.ask("Who?")
    page.until(lambda: page.state()[0])  # it reads
    page.keys(ESCAPE) if way == "escape" else page.find("#stop").click()
    page.wait_idle()
    assert page.text("notice") == "Stopped before the answer began."
    assert page.find("#question").get_attribute("value") == "Who?"  # to be asked again
    assert "log.txt" in page.text("chips") and page.turns == 0
    assert page.focus() == "question"
    page.shot(f"stopped by {way}")


def test_keyboard_alone(page: Page) -> None:
    assert page.focus() == "question"
    page.keys("Hello")
    order = list[str]()
    for more in ("", ENTER, "", "", "", "", "", ""):  # Enter opens the options
        page.keys(TAB)
        order.append(page.focus())
        page.keys(more)
    assert order == ["ask", "SUMMARY", "system", "temperature", "top_p", "top_k", "seed", "max"]
    page.keys("5")
    assert page.find("#max").get_attribute("value") == "5"
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.shot("options")
    for _ in range(8):
        page.back()
    assert page.focus() == "question"
    page.keys(ENTER)
    page.until(lambda: page.facts())
    assert "5 answer tokens" in page.facts() and "cut at the longest answer" in page.facts()
    assert page.focus() == "question"
    page.back()
    assert page.focus() == "attach"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_screen(page: Page, size: tuple[int, int], scheme: str) -> None:
    page.open(size, scheme)
    page.shot(f"{scheme} {size[0]} empty")
    page.check_screen(size)
    page.drop(TEXT[:2000], "a-very-long-name-of-a-file-from-some-archive-" * 3 + ".txt")
    page.find("#options summary").click()
    page.shot(f"{scheme} {size[0]} options")
    page.check_screen(size)
    page.find("#max").send_keys("12")
    page.find("#options summary").click()
    page.find("#question").click()
    page.ask("A rather long question, to see how it wraps: who saw how many whales, and when?")
    page.check_screen(size)
    page.wait_idle()
    page.until(lambda: "in the cache" in page.text("live"))
    page.js("""
        const turn = document.querySelector(".turn.assistant .text");
        return import("/page/markdown.js").then((m) => turn.replaceChildren(m.markdown(
          arguments[0])));""", "# Whales\n\nSeen **daily**, see [the log](https://example.org):\n\n"
        "| day | whales |\n| --- | ---: |\n" + "| a rather long cell of a table | 7 |\n" * 3
        + "\n1. one\n2. two `x = 1`\n\n> said\n\n```python\nfor day in range(120): "
        "print(day, day * 7 % 91, 'whales were seen by the crew of the Ada')\n```\n")
    page.shot(f"{scheme} {size[0]} answered")
    page.check_screen(size)
    page.find("#history").click()
    page.until(lambda: page.all("#past[open] .open"))
    page.shot(f"{scheme} {size[0]} history")
    page.check_screen(size)


def test_what_cannot_be_read(page: Page, tmp_path: Path) -> None:
    page.drop(TEXT * 16, "long.txt")
    assert page.text("expected") == "too long: the limit is 32,768 tokens; remove some"
    page.keys("Who?")
    assert not page.find("#ask").is_enabled()
    page.shot("too long")
    page.find("#remove-all").click()
    assert page.focus() == "question" and not page.find("#files").is_displayed()
    page.until(lambda: page.find("#ask").is_enabled())
    for name, data, reason in (
            ("photo.jpg", b"\xff\xd8\0\0", "binary"), ("old.txt", b"caf\xe9 noir", "not UTF-8"),
            ("late.py", b"x" * 9000 + b"\0", "binary"), ("blank.txt", b" \n", "empty"),
            ("a.pdf", b"%PDF-1.4 \xe2", "PDF: `longspan generate --document` reads it"),
            ("a.docx", b"PK\3\4", "Word: `longspan generate --document` reads it")):
        file = tmp_path / name
        file.write_bytes(data)
        page.choose("file", file)
        page.until(lambda name=name, reason=reason: page.text(  # type: ignore[misc]
            "notice") == f"{name} is not taken: {reason}.")
        assert page.find("#left-out").is_displayed()
    page.shot("no text")


def test_a_reload_loses_nothing(page: Page) -> None:
    set_option(page, "max", "6")
    set_option(page, "system", "Be brief.")
    page.drop("One day.", "a.txt")
    page.ask("First?")
    page.wait_idle()
    answer = page.find(".turn.assistant .text").text
    page.drop("Two days.", "b.txt")
    page.until(lambda: "2 files" in page.text("count") or "1 file," in page.text("count"))
    page.reload()
    assert page.find(".turn.assistant .text").text == answer
    assert "with a.txt" in page.find(".turn.user").text
    page.until(lambda: "b.txt" in page.text("chips"))
    assert page.find("#max").get_attribute("value") == "6"
    page.until(lambda: "are in the cache" in page.text("live"))
    page.ask("Second?")
    page.wait_idle()
    (asked,) = page.sent()
    assert [message["content"] for message in asked["messages"]][::3] == [
        "Be brief.", "===== b.txt =====\nTwo days.\n\nSecond?"]


def test_a_reload_while_it_reads_keeps_the_question(page: Page) -> None:
    page.drop(TEXT * 5)
    page.ask("Who?")
    page.until(lambda: page.state()[0])
    page.reload()
    assert page.find("#question").get_attribute("value") == "Who?"
    page.until(lambda: "log.txt" in page.text("chips"))
    assert page.turns == 0


def test_history(page: Page) -> None:
    set_option(page, "max", "3")
    for question in ("First <b>one</b>", "Second"):
        page.ask(question)
        page.wait_idle()
        page.find("#new").click()
        assert page.turns == 0 and page.find("#drop").is_displayed()
    page.find("#history").click()
    page.until(lambda: len(page.all("#past .open")) == 2)
    assert [item.text.splitlines()[0] for item in page.all("#past .open")] == [
        "Second", "First <b>one</b>"]
    page.find("#past .open").click()
    assert page.find(".turn.user .text").text == "First <b>one</b>" and page.turns == 1
    page.find("#history").click()
    page.until(lambda: page.all("#past .open"))
    page.find("#past li:first-child .small").click()
    page.until(lambda: len(page.all("#past .open")) == 1)
    page.find("#forget").click()
    page.until(lambda: "Nothing yet." in page.text("past"))
    assert page.turns == 0


def test_edit_and_ask_again(page: Page) -> None:
    set_option(page, "max", "3")
    page.drop("One day.", "a.txt")
    page.ask("First?")
    page.wait_idle()
    page.ask("Second?")
    page.wait_idle()
    page.find(".turn:nth-child(1) .edit").click()
    assert page.text("editing").startswith("Editing: what follows this question is replaced.")
    page.keys(ESCAPE)
    assert page.turns == 2 and page.find("#question").get_attribute("value") == ""
    page.find(".turn:nth-child(3) .edit").click()
    page.keys(" And third?", ENTER)
    page.until(lambda: len(page.sent()) == 3)
    page.wait_idle()
    assert [message["content"] for message in page.sent()[2]["messages"]][::2] == [
        "===== a.txt =====\nOne day.\n\nFirst?", "Second? And third?"]
    page.find(".turn:nth-child(2) .again").click()
    page.until(lambda: len(page.sent()) == 4)
    page.wait_idle()
    assert [message["content"] for message in page.sent()[3]["messages"]] == [
        "===== a.txt =====\nOne day.\n\nFirst?"]
    assert page.turns == 1


def test_options_are_sent_and_what_is_left_open_is_not(page: Page) -> None:
    page.ask("Hello")
    page.find("#stop").click()
    page.wait_idle()
    page.js("document.querySelector('#question').value = ''")  # back there if nothing had come
    assert not {"temperature", "top_p", "top_k", "seed"} & set(page.sent()[0])
    assert page.sent()[0]["max_tokens"] == 512
    for name, value in (("temperature", "0"), ("top_p", "0.9"), ("top_k", "20"), ("seed", "3"),
                        ("max", "2"), ("system", "Be brief.")):
        set_option(page, name, value)
    page.ask("Hello again")
    page.wait_idle()
    sent = page.sent()[1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: sent[name] for name in ("temperature", "top_p", "top_k", "seed", "max_tokens")
            } == {"temperature": 0, "top_p": 0.9, "top_k": 20, "seed": 3, "max_tokens": 2}


def test_the_example_is_answered_in_one_click(page: Page) -> None:
    assert "finds facts in long texts" in page.text("about")
    page.find("#example").click()
    page.until(lambda: page.facts())
    (message,) = page.sent()[0]["messages"]
    key = re.search(r"magic number for ([\w-]+) mentioned", message["content"])[1]
    value = re.search(rf"magic numbers for {key} is: (\d+)\.", message["content"])[1]
    assert page.find(".turn.assistant .text").text == value
    page.shot("example")


def test_copied_answers_are_their_source(page: Page) -> None:
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {
        "origin": page.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    set_option(page, "max", "4")
    page.ask("**Hello**")
    page.wait_idle()
    page.find(".turn.user .copy").click()
    page.until(lambda: page.find(".turn.user .copy").text == "Copied")
    assert page.driver.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0])") == "**Hello**"


def test_the_true_state_when_the_server_is_gone(driver: Any, tmp_path: Path) -> None:
    with running() as server:
        page = Page(driver, server.url, tmp_path)
        page.open()
        page.keys("Hello")
        page.until(lambda: page.find("#ask").is_enabled())
        server.server.should_exit = True
        page.until(lambda: page.text("state") == "unreachable", 15)
    assert page.text("notice").startswith("The server cannot be reached")
    assert not page.find("#ask").is_enabled()
    page.keys(ENTER)
    assert page.turns == 0 and page.find("#question").get_attribute("value") == "Hello"
    page.shot("gone")
    driver.get_log("browser")


def test_a_folder_as_the_command_line_reads_it(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    for name, text in {
            ".gitignore": "*.log\nbuild/\n/top.txt\n!keep.log\ndeep/**/x.txt\nq[ab]?.c\n\\#d\n",
            "a.log": "1", "keep.log": "2", "top.txt": "3", "sub/top.txt": "4", "build/out": "5",
            "deep/a/b/x.txt": "7", "deep/x.txt": "7", "deep/y.txt": "8", "qa1.c": "9", "qc1.c": "x",
            "sub/.gitignore": "!a.log\ny.txt\n", "sub/a.log": "9", "sub/y.txt": "10", "#d": "11",
            ".env": "key", "crlf.txt": "a\r\nb\r\n", "page.html": "<p>One &amp; two</p>",
            "wide.txt": "", "old.txt": "", "blank": "\n", "doc/README.md": "# Title\n"}.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    (folder / "wide.txt").write_bytes("wide é".encode("utf-16"))
    (folder / "old.txt").write_bytes(b"caf\xe9")
    expected = gather([str(folder)])
    names = [one.name for one in expected.documents]
    for way in ("drop", "choose"):
        page.open()
        page.drop_paths(folder) if way == "drop" else page.choose("folder", folder)
        page.until(lambda: page.text("expected"))
        shown = [item.text for item in page.all("#chips .name")]
        assert sorted(shown) == sorted(names)
        left_out = page.js("return [...document.querySelectorAll('#left-out li')].map("
                           "(e) => e.textContent)")
        assert sorted(left_out) == sorted(f"{one.name}: {one.reason}" for one in expected.left_out)
        set_option(page, "max", "1")
        page.find("#question").click()
        page.ask("Which?")
        page.wait_idle()
        content = page.sent()[0]["messages"][0]["content"]
        for one in expected.documents:
            assert f"===== {one.name} =====\n{one.text.strip()}\n" in content
