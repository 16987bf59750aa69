"""`longspan generate`: one prompt from a file, its answer on stdout, a report on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.commands.console import PrefillBar, note, report_rows, write_answer
from longspan.engine.front.llm import LLM
from longspan.engine.request import Progress, RequestOutput, SamplingParams, TokenEvent
from longspan.errors import InvalidRequestError
from longspan.text_files import STANDARD_INPUT, read_standard_input, read_text


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSource:
    """Where the prompt comes from."""

    file: str
    """``-`` is standard input."""
    question: str | None = None
    """Asked after the document."""
    raw: bool = False
    """The text as it is, without the chat template."""

    def read(self) -> str:
        """Read the user's text. Raises `LongspanError`: unreadable, not UTF-8, or empty."""
        if not self.file:
            raise InvalidRequestError("the file's name is empty; name a text file, or - for "
                                      "standard input")
        is_file = self.file != "-"
        text = read_text(Path(self.file)) if is_file else read_standard_input()
        if not text.strip():
            name = self.file if is_file else STANDARD_INPUT
            raise InvalidRequestError(f"{name}: the prompt is empty; give some text")
        return text if self.question is None else f"{text.rstrip()}\n\n{self.question}"


def run(
    model: str, source: PromptSource, params: SamplingParams, as_json: bool,
    options: dict[str, Any],
) -> None:
    """Answer one prompt."""
    text = source.read()
    with LLM(model, max_num_requests=1, **options) as llm:
        events = llm.stream(text, params) if source.raw else llm.stream_chat(
            [{"role": "user", "content": text}], params)
        output = show(events, quiet=as_json)
        peak = llm.stats().peak_memory_bytes
    if as_json:
        print(json.dumps({**asdict(output), "peak_memory_bytes": peak}, ensure_ascii=False))
    else:
        for name, value in report_rows(output, peak):
            note(f"{name:<20} {value}")


def show(
    events: Iterator[Progress | TokenEvent], *, quiet: bool = False, title: str = "prefill"
) -> RequestOutput:
    """Draw the prefill, write the answer as it comes, and return the whole result."""
    output = None
    with PrefillBar(title) as bar:
        for event in events:
            if isinstance(event, Progress):
                bar.update(event)
                continue
            bar.stop()
            if not quiet:
                write_answer(event.text)
            output = event.output
    assert output is not None, "the last event holds the result"
    if not quiet:
        write_answer("\n")
    return output
