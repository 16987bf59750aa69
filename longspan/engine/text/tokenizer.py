"""Text to token ids and back, and conversations to prompts. No torch.

Uses the `tokenizers` library and jinja2 directly: transformers' AutoTokenizer imports torch, which
takes seconds and hundreds of megabytes in a process that never computes.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from longspan.config import read_json
from longspan.engine.text.call_format import CallFormat, find_format
from longspan.engine.text.chat_template import ChatTemplate
from longspan.engine.text.control_tokens import ControlTokens, SecretBackend
from longspan.errors import (
    CheckpointError,
    InvalidRequestError,
    LongspanError,
    MissingDependencyError,
)


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: ``tokenizer.json`` is missing or cannot be read, or the chat template is
        invalid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokenizer = _load(path / "tokenizer.json")
        self._config = _read_optional(path / "tokenizer_config.json")
        self._source = self._template_source()
        self._template = None if self._source is None else ChatTemplate(self._source, str(path))

    @cached_property
    def vocab_size(self) -> int:
        """All token ids, those of added tokens included, are below this."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return 1 + max(ids, default=-1)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion, from generation_config.json, config.json and the name.
        Raises `CheckpointError` for anything but token ids."""
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            value = _read_optional(self._path / name).get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(item) is int and item >= 0 for item in ids):
                raise CheckpointError(f"{self._path / name}: eos_token_id is {value!r}; a token id "
                                      "or a list of them is needed, correct the file")
            found.update(ids)
        text = _token_text(self._config.get("eos_token")) or ""
        if not isinstance(text, str):
            raise CheckpointError(f"{self._path / 'tokenizer_config.json'}: eos_token is {text!r}; "
                                  "a string is needed, correct the file")
        named = self._tokenizer.token_to_id(text)
        return frozenset(found if named is None else found | {named})

    @cached_property
    def text_start(self) -> int:
        """What stands in front of a text: the token for its beginning, or else for the end of the
        text before. Raises `CheckpointError` where there is neither."""
        names = self._special_tokens()
        text = names.get("bos_token") or names.get("eos_token") or ""
        found = self._tokenizer.token_to_id(text)
        if found is None:
            raise CheckpointError(f"{self._path / 'tokenizer_config.json'}: names no bos_token and "
                                  "no eos_token of the vocabulary; correct the file")
        return int(found)

    def to_json(self) -> str:
        """Return the text of tokenizer.json as it is used here."""
        return str(self._tokenizer.to_str())

    def piece(self, token_id: int) -> str | None:
        """Return a token as the vocabulary writes it; None for an id that it does not have."""
        found = self._tokenizer.id_to_token(token_id)
        return None if found is None else str(found)

    @cached_property
    def added_tokens(self) -> frozenset[int]:
        """Ids of tokens that were added to the vocabulary, written as their plain text."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def call_format(self) -> CallFormat | None:
        """How the checkpoint writes tool calls; None: its template takes no tools, or calls cannot
        be read."""
        return find_format(
            self._source or "", self._tokenizer.token_to_id, self.special_tokens)

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """Texts of the added tokens that `decode` leaves out, by id."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {index: token.content for index, token in added.items() if token.special}

    @cached_property
    def decoder_kinds(self) -> frozenset[str]:
        """Types of the parts of the decoder, as tokenizer.json names them."""
        decoder = self._tokenizer.decoder
        state = {} if decoder is None else json.loads(decoder.__getstate__())
        return frozenset(part["type"] for part in state.get("decoders", [state]) if part)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> array[int]:
        """Token ids, special tokens in the text recognised.

        One pass over the whole text: pieces could merge differently at their borders.

        Args:
            add_special_tokens: put in what the checkpoint wants around a plain prompt (a
                beginning-of-text token, for example). Pieces of a prompt want none, and chat
                templates contain them.
        """
        return _encoded(self._encode, text, add_special_tokens=add_special_tokens)

    def _encode(self, text: str, *, add_special_tokens: bool) -> array[int]:
        encoding = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens)[0]
        return array("i", encoding.ids)

    def decode(self, token_ids: Sequence[int], *, with_special: bool = False) -> str:
        """Text of the tokens, special ones left out or written as the vocabulary has them."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=not with_special))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_special_tokens: bool = False,
        continue_final_message: bool = False, **values: Any,
    ) -> array[int]:
        """Token ids of a conversation's prompt. The template's own marks become control tokens;
        whatever the contents hold stays text.

        Args:
            continue_final_message: the last message is the beginning of the answer, and the prompt
                ends where it ends.

        Other arguments and errors are those of `render_chat` and `encode`.
        """
        protected, others, has_marked = self._control.protect(_plain(messages), values)
        rendered = self._rendered_open(protected, others) if continue_final_message else \
            self.render_chat(protected, **others)
        if not has_marked:
            return self.encode(rendered, add_special_tokens=add_special_tokens)
        secret = self._secret_backend
        return _encoded(secret.encode, self._control.replace(rendered, secret.secret_of),
                        add_special_tokens=add_special_tokens)

    def _rendered_open(
        self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]
    ) -> str:
        """Render a conversation up to the end of its last message's content."""
        last = messages[-1]
        end = self._control.end
        if last["role"] != "assistant" or not isinstance(last.get("content"), str):
            raise InvalidRequestError("the last message is to be continued; it must have the role "
                                      "assistant and some text")
        opened = [*messages[:-1], {**last, "content": last["content"] + end}]
        rendered = self.render_chat(opened, **{**values, "add_generation_prompt": False})
        before, found, _ = rendered.rpartition(end)
        if not found:
            raise InvalidRequestError("the last message cannot be continued: the chat template "
                                      "leaves it out")
        return before

    def prepare_chat(self) -> None:
        """Make now what `encode_chat` needs for contents that name control tokens: it takes half a
        second for a large vocabulary, which other threads would wait for."""
        if self._template is not None:
            _ = self._secret_backend

    @cached_property
    def _control(self) -> ControlTokens:
        added = self._tokenizer.get_added_tokens_decoder().values()
        return ControlTokens([token.content for token in added if token.special],
                             [token.content for token in added if not token.special],
                             self._source or "")

    @cached_property
    def _secret_backend(self) -> SecretBackend:
        return SecretBackend(
            self.to_json(), self._control.texts, self._tokenizer.token_to_id, _from_text)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], /, **values: Any) -> str:
        """Render a conversation as the text of a prompt by the checkpoint's template. To compute
        it, use `encode_chat`: this text no longer says which marks are the template's.

        Args:
            messages: ``{"role": ..., "content": ...}`` in order; a content may be a list of
                ``{"type": "text", "text": ...}``.
            values: further template variables, such as ``tools`` or ``enable_thinking``.

        Raises `InvalidRequestError` without messages, without a template, or when it refuses them.
        """
        messages = _plain(messages)
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; give a plain prompt instead of messages")
        return self._template.render({
            "add_generation_prompt": True, **self._special_tokens(), **values,
            "messages": messages})

    def _special_tokens(self) -> dict[str, str]:
        texts = {name: _token_text(self._config.get(name))
                 for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return {name: text for name, text in texts.items() if text}

    def _template_source(self) -> str | None:
        file = self._path / "chat_template.jinja"
        if file.is_file():
            return _read_text(file)
        source = self._config.get("chat_template")
        if isinstance(source, list):  # several templates, by name
            source = _templates_by_name(source, self._path).get("default")
        if not isinstance(source, str | None):
            raise CheckpointError(f"{self._path}: chat_template in tokenizer_config.json is "
                                  "neither text nor a list of named ones; fetch the file again")
        return source


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return messages whose contents are texts. Raises `InvalidRequestError` for what is none."""
    if not messages:
        raise InvalidRequestError("there are no messages; send at least one")
    if not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        raise InvalidRequestError("each message must be an object with a role and content")
    return [{**message, "content": _joined(message["content"])}
            if isinstance(message.get("content"), list | tuple) else message
            for message in messages]


def _joined(parts: Sequence[Any]) -> str:
    """Join the parts of a content. Templates differ in what they take; all take a text."""
    if not all(isinstance(part, Mapping) and part.get("type") == "text"
               and isinstance(part.get("text"), str) for part in parts):
        raise InvalidRequestError('each part of a content must be {"type": "text", "text": ...}')
    return "\n".join(part["text"] for part in parts)


def _encoded(encode: Callable[..., array[int]], text: str, **options: Any) -> array[int]:
    try:
        return encode(text, **options)
    except (UnicodeEncodeError, TypeError):  # lone surrogates
        raise InvalidRequestError("the prompt is not valid Unicode text") from None


def _load(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: no tokenizer.json there; fetch it with the weights")
    try:
        return _from_text(_read_text(file))
    except LongspanError:
        raise
    except Exception as error:  # the library raises a bare Exception for every fault in the file
        raise CheckpointError(f"{file}: not a valid tokenizer ({error}); fetch it again") from None


def _from_text(source: str) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise MissingDependencyError(
            "tokenizers is not installed: pip install tokenizers") from None
    tokenizer = Backend.from_str(source)
    tokenizer.no_truncation()  # some files carry a length of their training runs
    tokenizer.no_padding()
    return tokenizer


def _read_optional(file: Path) -> dict[str, Any]:
    raw = read_json(file) if file.is_file() else {}
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: not a JSON object; fetch the file again")
    return raw


def _token_text(value: Any) -> str | None:
    """Return a token of tokenizer_config.json: a string, or an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); fetch it again") from None


def _templates_by_name(entries: Sequence[Any], path: Path) -> dict[str, Any]:
    try:
        return {entry["name"]: entry["template"] for entry in entries}
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: an entry of chat_template in tokenizer_config.json has no "
                              "name or no template; fetch the file again") from None


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Load the checkpoint's tokenizer. Raises `CheckpointError` if it does not fit the model."""
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer knows {tokenizer.vocab_size} tokens, the model only "
            f"{vocab_size}; fetch matching files")
    last = max(tokenizer.eos_token_ids, default=0)
    if last >= vocab_size:
        raise CheckpointError(
            f"{path}: eos_token_id is {last}, and the model has {vocab_size} tokens; correct "
            "config.json or generation_config.json")
    return tokenizer
