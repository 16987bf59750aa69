"""Chat templates in a sandbox: no attribute of Python's own, no mutation, bounds on size and time.

A template comes with its checkpoint, from the network. Whether it is valid and keeps within the
bounds is found when it is loaded, with one short message; what fails later is due to the messages.
No torch.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from longspan.errors import CheckpointError, InvalidRequestError

MAX_CHARS = 32 * 1024**2
"""Longest text or list that a template may make: five times the text of a million tokens."""
MAX_BITS = 1024
"""Bits of the largest whole number that a template may make."""
MAX_RENDER_S = 5.0
"""Processor time for one conversation; the longest one needs some hundredths of a second."""
USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
PROBES = ((USER,), (SYSTEM, USER), (USER, ANSWER, USER), (SYSTEM, USER, ANSWER, USER))
"""Conversations; a template that renders none of them is of no use."""
PROBE_VALUES = {"bos_token": "", "eos_token": "", "unk_token": "", "pad_token": ""}
PADDING = frozenset({"batch", "center", "indent", "slice", "expandtabs", "ljust", "rjust", "zfill"})
"""Filters and methods of texts whose result is as large as an argument says."""
FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""Exceptions that a template raises, on purpose or by a mistake."""


class _BoundPassedError(TemplateError):
    """The template makes a text, list or number that is too large."""


class ChatTemplate:
    """A template that may be rendered, from several threads too.

    Args:
        origin: where it comes from, for errors.

    Raises `CheckpointError` for one that is not valid, or goes beyond the bounds with one short
    message.
    """

    def __init__(self, source: str, origin: str) -> None:
        self._environment = _Sandbox()
        self._environment.start()  # constant expressions are computed now
        try:
            self._template = self._environment.from_string(source)
        except (TemplateError, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"{origin}: the chat template is not valid jinja ({_line(error)})") from None
        self._probe(origin)

    def _probe(self, origin: str) -> None:
        """Find now what would fail at every chat."""
        reasons = list[str]()
        for messages in PROBES:
            try:
                self._render({"messages": messages, "add_generation_prompt": True,
                              **PROBE_VALUES})
                return
            except _BoundPassedError as error:
                raise CheckpointError(f"{origin}: the chat template {_line(error)} with one short "
                                      "message; fetch another one") from None
            except FAULTS as error:
                reasons.append(_line(error))
        raise CheckpointError(f"{origin}: the chat template fails with any conversation "
                              f"({reasons[0]}); fetch another one")

    def render(self, values: Mapping[str, Any]) -> str:
        """Render the prompt. Raises `InvalidRequestError` when the template refuses the values."""
        try:
            return self._render(values)
        except _BoundPassedError as error:
            raise InvalidRequestError(
                f"the chat template {_line(error)} with these messages") from None
        except FAULTS as error:
            raise InvalidRequestError(
                f"the chat template refuses these messages: {_line(error)}") from None

    def _render(self, values: Mapping[str, Any]) -> str:
        pieces, num_chars = list[str](), 0
        self._environment.start()
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                num_chars += len(piece)
                self._environment.check_size(num_chars)
        except OverflowError as error:
            raise _BoundPassedError(f"makes too much ({_line(error)})") from None
        except RecursionError:
            raise _BoundPassedError("recurses too deeply") from None
        except MemoryError:
            raise _BoundPassedError("takes more memory than there is") from None
        return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Looks at the clock in each round of a loop and each call, at the size of whatever is made."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True,
                         extensions=["jinja2.ext.loopcontrols", _Generation])
        self._started = threading.local()
        self.globals.pop("lipsum")
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.filters["tojson"] = _to_json
        self.filters = {name: self._bounded(name, work) for name, work in self.filters.items()}
        self.filters["bounded rounds"] = pass_context(lambda _, values: self._rounds(values))
        self.filters["bounded text"] = pass_context(lambda _, value: self._checked(value))

    def start(self) -> None:
        """Start the clock of a rendering on this thread."""
        self._started.time_s = time.thread_time()

    def check_size(self, size: int) -> None:
        """Raise if a text or list is too long, or time is up."""
        if size > MAX_CHARS:
            raise _BoundPassedError(f"makes more than {MAX_CHARS} characters or items")
        if time.thread_time() - self._started.time_s > MAX_RENDER_S:
            raise _BoundPassedError(f"takes more than {MAX_RENDER_S:g} s")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Check a call of the template."""
        if isinstance(getattr(__obj, "__self__", None), str):
            __self._check_padding(__obj.__name__, args)
        return __self._checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Check operators whose result can be far larger than their operands."""
        if operator == "*":
            self.check_size(_factor(left) * _factor(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._checked(1 << min(left.bit_length() * abs(right), 2 * MAX_BITS))
        return self._checked(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Bounds().visit(super()._parse(source, name, filename))
        return template

    def _bounded(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work, assigned=())  # keeps the marks that tell jinja what to pass
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._check_padding(name, (*args, *kwargs.values()))
            return self._checked(work(*args, **kwargs))

        return bounded

    def _check_padding(self, name: str, values: Iterable[Any]) -> None:
        if name in PADDING:
            self.check_size(max((_factor(value) for value in values), default=0))

    def _checked(self, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise _BoundPassedError(f"makes a number of more than {MAX_BITS} bits")
        self.check_size(len(value) if isinstance(value, str | list | tuple) else 0)
        return value

    def _rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.check_size(0)
            yield value


class _Bounds(NodeTransformer):
    """Puts the sandbox's checks where it has no hook: loops, ``~`` and blocks that are assigned."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Count the rounds of a loop."""
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "bounded rounds")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Check the size of joined texts."""
        self.generic_visit(node)
        return _filtered(node, "bounded text")

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        """Check the size of a block whose text becomes a variable."""
        self.generic_visit(node)
        node.filter = _filtered(node.filter, "bounded text")
        return node


class _Generation(Extension):
    """``{% generation %}`` marks what a model is trained on; here it marks nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse to the block's content, with its own variables."""
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _factor(value: Any) -> int:
    """Return the length by which a product grows; a number counts with its bits."""
    if isinstance(value, Sized):
        return len(value)
    return max(0, value) if isinstance(value, int) else 0


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
    """Encode as transformers does: no HTML escapes, unlike jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
