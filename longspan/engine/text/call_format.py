"""How checkpoints write tool calls: a small table, chosen by the chat template. No torch.

The template tells the model how to call tools, so its text says which of the formats it means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MAX_CALLS = 16
"""Most calls of one answer that has to be calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallFormat:
    """One way to write ``begin {"name": NAME, KEY: {...}} end``."""

    name: str
    signs: tuple[str, ...]
    """Texts of which the template holds one."""
    begin: str
    """In front of each call. Empty: an answer that begins with a brace is one."""
    end: str
    """Behind each call."""
    separator: str
    """Between calls."""
    key: str
    """Under which the arguments stand."""
    begin_id: int | None = None
    """Token of ``begin``, where the vocabulary has one."""
    end_id: int | None = None
    """Token of ``end``."""

    def grammar(
        self, tools: Mapping[str, Mapping[str, Any]], *, is_single: bool = False,
        answer: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a grammar, in Lark's notation, of answers that call these tools.

        Args:
            tools: JSON schemas of the arguments, by the tools' names.
            is_single: exactly one call; else as many as `MAX_CALLS`.
            answer: JSON schema of answers that are no calls; None: there are only calls.
        """
        more = "" if is_single else f" ({_text(self.separator)} call){{0,{MAX_CALLS - 1}}}"
        rules = [f"start: calls{'' if answer is None else ' | answer'}", f"calls: call{more}"]
        names = [f"call_{index}" for index in range(len(tools))]
        rules += [f"call: {self._mark(self.begin, self.begin_id)}body"
                  f"{self._mark(self.end, self.end_id, is_end=True)}",
                  f"body: {' | '.join(names)}"]
        for rule, (tool, schema) in zip(names, tools.items(), strict=True):
            head = f'{{"name": {json.dumps(tool, ensure_ascii=False)}, "{self.key}": '
            rules.append(f"{rule}: {_text(head)} %json {json.dumps(schema)} \"}}\"")
        if answer is not None:
            rules.append(f"answer: %json {json.dumps(answer)}")
        return "\n".join(rules)

    def _mark(self, text: str, token_id: int | None, *, is_end: bool = False) -> str:
        if not text:
            return ""
        mark = _text(text) if token_id is None else f"<[{token_id}]>"
        return f' "\\n" {mark}' if is_end else f'{mark} "\\n" '


FORMATS: Sequence[CallFormat] = (
    CallFormat(name="hermes", signs=("<tool_call>",), begin="<tool_call>", end="</tool_call>",
               separator="\n", key="arguments"),
    CallFormat(name="llama", signs=('"parameters": dictionary', "<|python_tag|>"), begin="",
               end="", separator="; ", key="parameters"))
"""Hermes' (Qwen2.5, Qwen3 and many others) and Llama 3's."""
OTHERS = ("<function=",)
"""Texts of templates that use marks of the table for calls that are no JSON."""


def find_format(
    template: str, token_id: Callable[[str], int | None], special_tokens: Mapping[int, str]
) -> CallFormat | None:
    """Return the format that a chat template means; None where it takes no tools, or writes calls
    in a way that is not in the table."""
    if "tools" not in template or any(other in template for other in OTHERS):
        return None
    for found in FORMATS:
        if any(sign in template for sign in found.signs):
            marks = token_id(found.begin), token_id(found.end)
            if special_tokens.keys() & set(marks):
                return None  # the marks are no part of the text
            return replace(found, begin_id=marks[0], end_id=marks[1])
    return None


def _text(text: str) -> str:
    """Write a text as Lark does."""
    return json.dumps(text, ensure_ascii=False)
