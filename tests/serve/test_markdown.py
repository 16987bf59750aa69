"""Markdown of answers as elements: what it shows, and that nothing in it is ever run."""

from __future__ import annotations

import time

import pytest

from tests.serve.browser import Page

pytestmark = pytest.mark.browser
SHOW = """
const box = document.createElement("div");
box.append(m.markdown(args[0]));
box.querySelectorAll(".code-head").forEach((head) => head.remove());
for (const node of box.querySelectorAll("*"))
  for (const { name } of [...node.attributes])
    if (!["href", "start"].includes(name)) node.removeAttribute(name);
return box.innerHTML;
"""


def html(page: Page, text: str) -> str:
    return str(page.call("markdown.js", SHOW, text))


@pytest.mark.parametrize(("text", "shown"), [
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    ("# A *b*\n## C ##", "<div>A <em>b</em></div><div>C</div>"),
    ("**a _b_** `c*d*` ~~e~~", "<p><strong>a <em>b</em></strong> <code>c*d*</code> "
                              "<del>e</del></p>"),
    ("snake_case_name 2 * 3 * 4 \\*x\\*", "<p>snake_case_name 2 * 3 * 4 *x*</p>"),
    ("**open", "<p>**open</p>"), ("`open", "<p>`open</p>"),
    ("```python\nx = '<b>'\n\n# y\n```\nend", "<div><pre><code>x = '&lt;b&gt;'\n\n# y</code>"
                                              "</pre></div><p>end</p>"),
    ("~~~\n``` in\n", "<div><pre><code>``` in\n</code></pre></div>"),
    ("- a\n- b\n  - c\n\n  more\n- d", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul>"
                                       "<p>more</p></li><li><p>d</p></li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ("> a\n> > b\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("a\n\n---\n***", "<p>a</p><hr><hr>"),
    ("| a | b \\| c |\n|---|:-:|\n| 1 | `2` | 3 |\nend",
     "<div><table><thead><tr><th>a</th><th>b | c</th></tr></thead><tbody><tr><td>1</td>"
     "<td><code>2</code></td></tr></tbody></table></div><p>end</p>"),
    ("see [the *log*](https://a.example/x) or https://b.example/y_z_.",
     '<p>see <a href="https://a.example/x">the <em>log</em></a> or '
     '<a href="https://b.example/y_z">https://b.example/y_z</a>_.</p>'),
    ("", ""),
])
def test_what_is_shown(page: Page, text: str, shown: str) -> None:
    assert html(page, text) == shown


@pytest.mark.parametrize("text", [
    "<script>document.title = 'run'</script>", "<img src=x onerror=\"document.title='run'\">",
    "[a](javascript:document.title='run')", "[a](JaVaScRiPt:document.title='run')",
    "[a](data:text/html,<script>x</script>)", "![a](https://a.example/x.png)",
    "<https://a.example/\"onmouseover=x>", "```<img src=x onerror=x>\nx\n```",
    "| <img src=x onerror=x> |\n|---|\n| <svg onload=x> |", "[a](vbscript:x)", "<a href=x>y</a>"])
def test_nothing_in_an_answer_is_run_or_loaded(page: Page, text: str) -> None:
    found = page.call("markdown.js", """
        const box = document.createElement("div");
        box.append(m.markdown(args[0]));
        document.body.append(box);
        const bad = [...box.querySelectorAll("*")].filter((node) =>
          ["SCRIPT", "IMG", "SVG", "IFRAME", "OBJECT", "STYLE"].includes(node.tagName.toUpperCase())
          || [...node.attributes].some(({ name }) => name.startsWith("on"))
          || (node.href && !/^(https?|mailto):/.test(node.href)));
        await new Promise((resolve) => setTimeout(resolve, 50));
        box.remove();
        return [bad.length, document.title];""", text)
    assert found == [0, "longspan"]


@pytest.mark.parametrize("part", [
    "*", "_a ", "**a ", "`", "`` ` ", "[", "[a](", "![", "> ", "- ", "|", "|-", "<http://", "~~",
    "  - a\n", "#", "\\", "***", "a|b\n-|-\n", "1. ", "\n>", "*a _b ", "```\n"])
def test_hostile_text_takes_linear_time(page: Page, part: str) -> None:
    start = time.monotonic()
    length = page.call("markdown.js", "const box = document.createElement('div');"
                       "box.append(m.markdown(args[0])); return box.textContent.length;",
                       part * (100_000 // len(part)))
    assert time.monotonic() - start < 5 and length >= 0
