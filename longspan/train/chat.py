"""Conversations and preference pairs as tokens, by the checkpoint's own chat template.

Only answers are learned. Where the template marks them (``{% generation %}``), its marks are taken;
else an answer is what the template adds to the conversation before it, which must stay as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from longspan.errors import CheckpointError, LongspanError

GENERATION_MARK = "generation %}"
BATCH_CHARS = 8_000_000
"""Characters that are encoded at once, by as many threads as there are."""

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One row of a file."""

    place: str
    """File and line, for errors."""
    messages: Sequence[Message]
    last_only: bool = False
    """Only the last answer is learned."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Encoded dialogues, one behind the other."""

    ids: np.ndarray
    """uint32 [T]."""
    is_answer: np.ndarray
    """bool [T]."""
    starts: np.ndarray
    """Where each begins, and the end of the last, int64 [N + 1]."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 [N]."""
        return np.diff(self.starts)

    def at(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and answer marks of one."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[part], self.is_answer[part]


def read_dialogues(files: Sequence[Path]) -> list[Dialogue]:
    """Rows ``{"messages": [...]}`` of JSONL files. Raises `LongspanError` naming the line."""
    found = []
    for place, row in _rows(files):
        messages = _messages(row.get("messages"), place, "messages")
        if not any(message["role"] == "assistant" for message in messages):
            raise LongspanError(f"{place}: no message of the assistant, so nothing to learn: each "
                                "row needs one")
        found.append(Dialogue(place, messages))
    return found


def read_pairs(files: Sequence[Path]) -> list[Dialogue]:
    """Rows ``{"messages" or "prompt", "chosen", "rejected"}`` of JSONL files: two dialogues a row,
    the better first. Raises `LongspanError` naming the line."""
    found = []
    for place, row in _rows(files):
        asked = row.get("messages", row.get("prompt"))
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        question = _messages(asked, place, "messages (or prompt)")
        for name in ("chosen", "rejected"):
            reply = row.get(name)
            if isinstance(reply, str):
                reply = [{"role": "assistant", "content": reply}]
            answer = _messages(reply, place, name)
            found.append(Dialogue(place, [*question, *answer], last_only=True))
        if found[-1].messages == found[-2].messages:
            raise LongspanError(f"{place}: chosen and rejected are the same, so nothing to prefer: "
                                "leave the row out")
    return found


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    count = 0
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    count += 1
                    yield f"{file}:{number}", _object(line, f"{file}:{number}")
        except (OSError, UnicodeDecodeError) as error:
            raise LongspanError(f"{file} cannot be read ({error}): name a JSONL file") from None
    if not count:
        raise LongspanError(f"{', '.join(map(str, files)) or 'no file'}: no row there")


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise LongspanError(f"{place}: no JSON ({error}): mend or delete the line") from None
    if not isinstance(row, dict):
        raise LongspanError(f"{place}: a JSON object is needed, not {type(row).__name__}")
    return row


def _messages(value: Any, place: str, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str) for message in value):
        raise LongspanError(f"{place}: {name} must be a list of objects with role and content")
    return value


class ChatEncoder:
    """Encodes dialogues with the tokenizer and template of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: its tokenizer cannot be loaded "
                                  f"({str(error).splitlines()[0]})") from None
        template = self.tokenizer.chat_template
        if not isinstance(template, str):
            raise CheckpointError(f"{folder}: no chat template: add a chat_template.jinja")
        self.template = template
        self.is_marked = GENERATION_MARK in template

    def encode(self, dialogues: Sequence[Dialogue]) -> Samples:
        """Encode dialogues in order. Raises `LongspanError` naming a row that the template cannot
        render, or whose answers cannot be told from the rest."""
        ids, marks = [], []
        for batch in _batches(dialogues):
            if self.is_marked:
                for one, mark in map(self._marked, batch):
                    ids.append(one)
                    marks.append(mark)
                continue
            texts, spans = zip(*(self._render(dialogue) for dialogue in batch), strict=True)
            encoded = self.tokenizer(
                list(texts), add_special_tokens=False, return_offsets_mapping=True)
            for one, offsets, answers in zip(
                    encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
                ends = np.array(offsets, np.int64).reshape(-1, 2)[:, 1]
                mark = np.zeros(len(one), bool)
                for start, stop in answers:
                    mark |= (ends > start) & (ends <= stop)
                ids.append(np.array(one, np.uint32))
                marks.append(mark)
        starts = np.cumsum([0, *map(len, ids)])
        return Samples(np.concatenate(ids), np.concatenate(marks), starts)

    def _render(self, dialogue: Dialogue) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and where in it answers begin and end."""
        messages = list(dialogue.messages)
        try:
            text = self._text(messages)
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            spans = [self._span(text, messages, i) for i in turns[-1 if dialogue.last_only else 0:]]
        except LongspanError as error:
            raise LongspanError(f"{dialogue.place}: {error}") from None
        except Exception as error:  # a template raises whatever it likes
            raise LongspanError(f"{dialogue.place}: the chat template refuses the messages "
                                f"({error})") from None
        return text, spans

    def _marked(self, dialogue: Dialogue) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and the template's own marks."""
        encoded: Any
        try:
            encoded = self.tokenizer.apply_chat_template(
                [dict(message) for message in dialogue.messages], tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True)
        except Exception as error:  # a template raises whatever it likes
            raise LongspanError(f"{dialogue.place}: the chat template refuses the messages "
                                f"({error})") from None
        mark = np.array(encoded["assistant_masks"], bool)
        if dialogue.last_only and mark.any():
            before = np.flatnonzero(~mark[: np.flatnonzero(mark)[-1]])
            mark[: before[-1] + 1 if len(before) else 0] = False
        return np.array(encoded["input_ids"], np.uint32), mark

    def _text(self, messages: Sequence[Message], ask: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=ask))

    def _span(self, text: str, messages: Sequence[Message], turn: int) -> tuple[int, int]:
        before = self._text(messages[:turn], ask=True)
        through = self._text(messages[: turn + 1])
        if not (text.startswith(through.rstrip()) and through.startswith(before)):
            raise LongspanError(
                "the chat template changes earlier messages when an answer is added, so answers "
                "cannot be told from the rest: split the row at its answers")
        # What follows the token that ends the answer is nothing that a model writes.
        return len(before), len(through.rstrip())


def _batches(dialogues: Sequence[Dialogue]) -> Iterator[list[Dialogue]]:
    batch: list[Dialogue] = []
    size = 0
    for dialogue in dialogues:
        batch.append(dialogue)
        size += sum(len(message["content"]) for message in dialogue.messages)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
