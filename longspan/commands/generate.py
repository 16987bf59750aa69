"""`longspan generate`: questions about documents, answers on stdout, a report on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.commands.console import (
    PrefillBar,
    note,
    report_rows,
    seconds,
    write_answer,
)
from longspan.commands.documents import show_documents
from longspan.commands.questions import PROMPT, check_input, is_at_terminal, read_questions
from longspan.documents.gather import Gathering, as_prompt, gather
from longspan.documents.sources import Source, SourceIndex, describe_sources
from longspan.engine.front.llm import LLM
from longspan.engine.intake import default_sampling
from longspan.engine.request import Event, Progress, RequestOutput, SamplingParams, TokenEvent
from longspan.errors import InvalidRequestError, LongspanError
from longspan.model.weights import resolve_checkpoint
from longspan.text_files import STANDARD_INPUT, read_standard_input, read_text


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSource:
    """Where the prompt comes from: one file as it stands, or documents under their names."""

    file: str | None = None
    """``-`` is standard input."""
    documents: tuple[str, ...] = ()
    """Files and folders; ``-`` is standard input."""
    questions: tuple[str, ...] = ()
    """Each is asked on its own, after the text."""
    raw: bool = False
    """The text as it is, without the chat template."""
    shows_sources: bool = False
    """After each answer, where in the documents it stands."""

    def __post_init__(self) -> None:
        if (self.file is not None) is bool(self.documents):
            raise InvalidRequestError(
                "give --document, files and folders to ask about, or --prompt-file, a whole prompt"
                + (", not both" if self.documents else "") + "; see longspan generate --help")
        if self.file == "":
            raise InvalidRequestError("the file's name is empty; name a text file, or - for "
                                      "standard input")
        if not all(question.strip() for question in self.questions):
            raise InvalidRequestError("--question is empty; ask something")
        if self.shows_sources and not self.documents:
            raise InvalidRequestError("--sources looks for answers in documents; give --document")
        if self.asks_for_questions:
            check_input(is_taken="-" in self.documents)

    @property
    def asks_for_questions(self) -> bool:
        """Whether questions come from standard input."""
        return bool(self.documents) and not self.questions

    def read(self) -> tuple[str, Gathering]:
        """Read the text and the documents that it is made of, if it is. Raises `LongspanError`:
        unreadable, not UTF-8, or empty."""
        if self.documents:
            found = gather(self.documents)
            return as_prompt(found.documents), found
        assert self.file is not None
        is_file = self.file != "-"
        text = read_text(Path(self.file)) if is_file else read_standard_input()
        if not text.strip():
            name = self.file if is_file else STANDARD_INPUT
            raise InvalidRequestError(f"{name}: the prompt is empty; give some text")
        return text, Gathering()


def run(
    model: str, source: PromptSource, sampling: Mapping[str, Any], as_json: bool,
    options: dict[str, Any],
) -> None:
    """Answer every question about one text, which is read once.

    Args:
        sampling: fields of `SamplingParams`; what is None is left to the checkpoint.
        options: of `LLM`.
    """
    text, found = source.read()
    params = choose_sampling(model, sampling, with_weights=options.get("weights") == "checkpoint")
    with LLM(model, max_num_requests=1, **options) as llm:
        about: dict[str, Any] = {}
        if found.documents:
            counts = show_documents(found, lambda part: len(llm.tokenizer.encode(part)))
            about = {"documents": [{"name": one.name, "num_tokens": tokens} for one, tokens
                                   in zip(found.documents, counts, strict=True)],
                     "left_out": [asdict(one) for one in found.left_out]}
        index = SourceIndex(found.documents) if source.shows_sources else None
        asker = _Asker(llm, params, text, source.raw, about, as_json, index)
        if source.asks_for_questions:
            asker.converse(read_questions())
        else:
            asker.ask_each(source.questions)


def choose_sampling(
    model: str, asked: Mapping[str, Any], *, with_weights: bool = True
) -> SamplingParams:
    """Choose as a server does: what is asked for, else what the checkpoint recommends. Without
    either the most probable token is taken."""
    advised = default_sampling(resolve_checkpoint(model, with_weights=with_weights))
    wanted = {name: value for name, value in asked.items() if value is not None}
    return SamplingParams(**{"temperature": 0.0, **advised, **wanted})


def describe_sampling(params: SamplingParams) -> str:
    """Name what differs from plain sampling, in words."""
    plain = SamplingParams()
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
    changed = [f"{name} {getattr(params, name):g}" for name in names
               if getattr(params, name) != getattr(plain, name)]
    if not params.temperature:
        return ", ".join(["the most probable token", *(
            part for part in changed if part.startswith("repetition"))])
    return ", ".join([f"temperature {params.temperature:g}", *changed])


class _Asker:
    """Asks about one text, and shows each answer and what it cost."""

    def __init__(
        self, llm: LLM, params: SamplingParams, text: str, raw: bool,
        about: Mapping[str, Any], as_json: bool, index: SourceIndex | None = None,
    ) -> None:
        self._llm, self._params, self._text, self._raw = llm, params, text, raw
        self._about, self._as_json, self._index = about, as_json, index
        self._num_answers = 0

    def ask_each(self, questions: Sequence[str]) -> None:
        """Ask each on its own; without any the text itself is the question."""
        for question in questions or (None,):
            if len(questions) > 1 and not self._as_json:
                write_answer(f"{PROMPT}{question}\n")
            self._answer([{"role": "user", "content": self._with_text(question)}], question)

    def converse(self, questions: Iterable[str]) -> None:
        """Ask one after another; each follows the answers before it."""
        messages: list[dict[str, str]] = []
        for question in questions:
            if not is_at_terminal() and not self._as_json:
                write_answer(f"{PROMPT}{question}\n")
            content = question if messages else self._with_text(question)
            asked = [*messages, {"role": "user", "content": content}]
            try:
                output = self._answer(asked, question)
            except LongspanError as error:
                if not is_at_terminal():
                    raise
                note(f"error: {error}")
            except KeyboardInterrupt:
                if not is_at_terminal():
                    raise
                write_answer("\n")
                note("stopped; end with Ctrl-D")
            else:
                messages = [*asked, {"role": "assistant", "content": output.text}]

    def _with_text(self, question: str | None) -> str:
        return self._text if question is None else f"{self._text.rstrip()}\n\n{question}"

    def _answer(
        self, messages: Sequence[Mapping[str, str]], question: str | None
    ) -> RequestOutput:
        output = show(self._events(messages), quiet=self._as_json)
        self._num_answers += 1
        found = self._index.find(output.text, question or "") if self._index else []
        if self._index and not self._as_json:
            write_answer(describe_sources(found))
        self._report(output, question, found)
        return output

    def _events(self, messages: Sequence[Mapping[str, str]]) -> Iterator[Event]:
        if not self._raw:
            return self._llm.stream_chat(messages, self._params)
        prompt = "\n\n".join(message["content"] for message in messages)
        return self._llm.stream(prompt, self._params)

    def _report(
        self, output: RequestOutput, question: str | None, found: Sequence[Source],
    ) -> None:
        peak = self._llm.stats().peak_memory_bytes
        if self._as_json:
            asked = {} if question is None else {"question": question}
            sources = {"sources": list(map(asdict, found))} if self._index else {}
            print(json.dumps({**asked, **asdict(output), **sources, "peak_memory_bytes": peak,
                              **self._about}, ensure_ascii=False), flush=True)
        elif self._num_answers == 1:
            rows = [*report_rows(output, peak), ("sampling", describe_sampling(self._params))]
            for name, value in rows:
                note(f"{name:<20} {value}")
        else:
            note(f"first token after {seconds(output.ttft_s)}, {output.num_cached_tokens:,} of "
                 f"{output.num_prompt_tokens:,} prompt tokens cached")


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
