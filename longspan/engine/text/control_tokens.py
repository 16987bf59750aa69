"""Contents are text: only the chat template's own marks become control tokens. No torch.

A document may hold ``<|im_end|>`` and a whole conversation after it. Two steps keep it a document.
Before the template is rendered, each such text in the contents gets a secret number behind its
first character, so that what the template writes can be told from what it was given. After that,
the template's marks are replaced by other secret numbers, those in the contents are taken out, and
the prompt is encoded by a second tokenizer, which differs from the checkpoint's in one thing: its
control tokens are written as those numbers. So whatever the tokenizer does at borders (spaces that
it adds, strips or merges) it does here too, and contents that name no control token have the very
tokens that they always had.
"""

from __future__ import annotations

import json
import re
import secrets
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from longspan.errors import InvalidRequestError

NUM_DIGITS = 24
"""Digits of a secret number: nobody guesses it, and no filter of a template changes it."""
FENCED = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
"""How control tokens are written whatever else the vocabulary says of them."""
MARK = re.compile(r"[^\w\s].+\S", re.DOTALL)
"""Anything less is a piece of text, such as a word, a sign or white space."""
FOREIGN_ROLES = frozenset({"user", "tool", "function", "ipython"})
"""Roles whose contents come from people and files."""


class ControlTokens:
    """Keeps the control tokens of one checkpoint out of contents.

    Special tokens are kept out of everything that is given to the template. Other added tokens
    that control a conversation (those that the template writes, such as ``<tool_call>``, and those
    between ``<|`` and ``|>``) are kept out of contents from people and files; an answer that is
    sent back, or the operator's own words, may name them.

    Args:
        specials: control tokens that are never shown.
        others: added tokens that are.
        template: source of the chat template.
    """

    def __init__(self, specials: Iterable[str], others: Iterable[str], template: str) -> None:
        special = frozenset(filter(str.strip, specials))
        shown = frozenset(text for text in others if MARK.fullmatch(text)
                          and (text in template or FENCED.fullmatch(text)))
        self.texts = special | shown
        self._number = _secret()
        self.end = _secret()
        """Marks a place in a content; no content has it."""
        self._in_foreign, self._in_own = _any_of(self.texts), _any_of(special)

    def protect(
        self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
        """Mark control tokens in contents. Returns messages and values for the template, and
        whether there was anything to mark."""
        marker = _Marker(self._number)
        protected = [
            {key: marker.mark(value, self._pattern(message)) for key, value in message.items()}
            for message in messages]
        others = {key: marker.mark(value, self._in_own) for key, value in values.items()}
        return protected, others, marker.has_marked

    def replace(self, rendered: str, secret_of: Mapping[str, str]) -> str:
        """Write the template's own marks as their secret numbers, and the others as they were."""
        # The template's come first: what is left is what was marked.
        rendered = self._in_foreign.sub(lambda found: secret_of[found.group()], rendered)
        return rendered.replace(self._number, "")

    def _pattern(self, message: Mapping[str, Any]) -> re.Pattern[str]:
        return self._in_foreign if message.get("role") in FOREIGN_ROLES else self._in_own


class _Marker:
    """Puts a number into the control tokens that a value's texts name."""

    def __init__(self, number: str) -> None:
        self._number = number
        self.has_marked = False

    def mark(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """Return the value, or a copy where it has control tokens."""
        if isinstance(value, str):
            if pattern.search(value) is None:
                return value
            self.has_marked = True
            return pattern.sub(self._split, value)
        if isinstance(value, Mapping):
            return {self.mark(key, pattern): self.mark(item, pattern)
                    for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, pattern) for item in value]
        return value

    def _split(self, found: re.Match[str]) -> str:
        text = found.group()
        return text[0] + self._number + text[1:]


class SecretBackend:
    """A second tokenizer, whose control tokens are written as secret numbers.

    Args:
        source: text of the first one's tokenizer.json.
        texts: the control tokens.
        token_id: the first one's id of an added token.
        load: makes a tokenizer of such a text.
    """

    def __init__(
        self, source: str, texts: Collection[str], token_id: Callable[[str], int | None],
        load: Callable[[str], Any],
    ) -> None:
        number = _secret()
        # Numbers of one length: none is the beginning of another.
        self.secret_of = {
            text: f"{number}{index:06d}" for index, text in enumerate(sorted(texts))}
        raw = json.loads(source)
        wanted = {self.secret_of.get(token["content"], token["content"]):
                  token_id(token["content"]) for token in raw["added_tokens"]}
        for token in raw["added_tokens"]:
            token["content"] = self.secret_of.get(token["content"], token["content"])
        _rename(raw["model"], self.secret_of)
        self._backend = load(json.dumps(raw))
        ids = {self._backend.token_to_id(text): number for text, number in wanted.items()}
        self._renumbered = {ours: theirs for ours, theirs in ids.items() if ours != theirs}
        self._check()

    def encode(self, text: str, *, add_special_tokens: bool) -> array[int]:
        """Encode a text in which control tokens are written as `secret_of` says."""
        ids = self._backend.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens)[0].ids
        if self._renumbered:
            ids = [self._renumbered.get(token, token) for token in ids]
        return array("i", ids)

    def _check(self) -> None:
        """Raise `InvalidRequestError` where the tokenizer changes even numbers."""
        for text, secret in self.secret_of.items():
            found = self._backend.encode(secret, add_special_tokens=False).ids
            if self._backend.token_to_id(secret) not in found:
                raise InvalidRequestError(
                    f"a message holds the text of a control token, and this model's tokenizer "
                    f"cannot write {text} as text; take it out")


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename control tokens that the model itself knows as pieces of text."""
    vocab = model.get("vocab") or {}
    if isinstance(vocab, list):  # Unigram: [piece, score]
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
        return
    known = {text for text in names if text in vocab}
    for text in known:
        vocab[names[text]] = vocab.pop(text)
    if model.get("unk_token") in known:
        model["unk_token"] = names[model["unk_token"]]
    if known and "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if _joined(pair) not in known]


def _joined(pair: str | Sequence[str]) -> str:
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left + right


def _secret() -> str:
    return str(secrets.randbelow(9 * 10 ** (NUM_DIGITS - 1)) + 10 ** (NUM_DIGITS - 1))


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Return a pattern of the texts, the longest first, that reads common beginnings once: a
    vocabulary may have hundreds of control tokens, and a document millions of characters."""
    return re.compile(_branches(sorted(texts)) if texts else r"(?!)")


def _branches(texts: Sequence[str]) -> str:
    rests = dict[str, list[str]]()
    for text in texts:
        if text:
            rests.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + _branches(rest) for first, rest in rests.items()]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and "" not in texts else f"(?:{'|'.join(branches)})"
    return joined + ("?" if "" in texts else "")
