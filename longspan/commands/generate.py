"""`longspan generate`: one prompt from a file, its answer on stdout, a report on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.commands.console import PrefillBar, note, report_rows, write_answer
from longspan.engine.front.llm import LLM
from longspan.engine.request import Progress, RequestOutput, SamplingParams, TokenEvent
from longspan.errors import InvalidRequestError


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
        """The user's text. Raises `InvalidRequestError`: unreadable, not UTF-8, or empty."""
        text = read_text(self.file)
        if not text.strip():
            raise InvalidRequestError(f"{_name(self.file)}: the prompt is empty; give some text")
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


def read_text(file: str) -> str:
    """A UTF-8 file, or standard input for ``-``."""
    if not file:
        raise InvalidRequestError("the file's name is empty; name a text file, or - for standard "
                                  "input")
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except FileNotFoundError:
        raise InvalidRequestError(f"{file}: no such file") from None
    except IsADirectoryError:
        raise InvalidRequestError(f"{file} is a directory; name a text file") from None
    except OSError as error:
        raise InvalidRequestError(f"{file}: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{_name(file)}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset "
            f"{error.start}); convert it first, for example with iconv") from None


def _name(file: str) -> str:
    return "standard input" if file == "-" else file
