"""Which tools a request offers, and the grammar of answers that have to call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.engine.text.call_format import CallFormat
from longspan.serve.errors import ApiError
from longspan.serve.messages import NamedTool, Tool
from longspan.serve.protocol import ChatRequest, TokenizeRequest


def offered_tools(request: ChatRequest | TokenizeRequest) -> Sequence[Tool]:
    """Return the tools that the model is told of; none with ``tool_choice: none``."""
    if isinstance(request, ChatRequest) and request.tool_choice == "none":
        return ()
    return request.tools or ()


def check_tools(request: ChatRequest, call_format: CallFormat | None) -> None:
    """Raise 400 for tools that cannot be offered, and for a choice without them."""
    offered, choice = offered_tools(request), request.tool_choice
    names = [tool.function.name for tool in offered]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise ApiError(400, f"tool_choice names {choice.function.name!r}, which is none of the "
                       "tools.", param="tool_choice")
    if choice == "required" and not offered:
        raise ApiError(400, "tool_choice: required needs tools.", param="tool_choice")
    if len(set(names)) < len(names):
        raise ApiError(400, "Two tools have one name.", param="tools")
    if offered and call_format is None:
        raise ApiError(400, "This model takes no tools: its chat template has no place for them, "
                       "or writes calls in a way that this server does not read.", param="tools")
    for tool in offered:
        if tool.function.schema_of_arguments["type"] != "object":
            raise ApiError(400, f"parameters of {tool.function.name} must be a JSON schema of an "
                           "object.", param="tools")


def tool_grammar(
    request: ChatRequest, call_format: CallFormat | None, answer: Mapping[str, Any] | None
) -> str | None:
    """Return the grammar that holds an answer to its tools; None where the model may say anything.

    Args:
        answer: schema of answers that are no calls; None: any text.
    """
    choice = request.tool_choice
    if call_format is None or choice in (None, "auto") and answer is None:
        return None
    schemas = {tool.function.name: tool.function.schema_of_arguments
               for tool in offered_tools(request)
               if not isinstance(choice, NamedTool) or choice.function.name == tool.function.name}
    is_single = isinstance(choice, NamedTool) or request.parallel_tool_calls is False
    return call_format.grammar(
        schemas, is_single=is_single, answer=answer if choice in (None, "auto") else None)
