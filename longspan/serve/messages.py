"""Messages and tools of a chat, and the fields that ask for nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError, core_schema

MAX_TOOLS = 128
NOT_SUPPORTED = "not_supported"
"""Type of the fault of a field that this server does not have."""
Hint = Annotated[Any, WithJsonSchema({})]
"""Any value: it changes no answer."""


class Neutral:
    """Annotates a field that this server does not have: null and the given values ask for nothing,
    any other is refused."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [None, *self.values]}

    def _check(self, value: Any) -> None:
        if value is not None and not any(
                value == other and type(value) is type(other) for other in self.values):
            raise PydanticCustomError(NOT_SUPPORTED, "not supported")


class Strict(BaseModel):
    """No unknown fields, no conversions between types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


# -- tools -----------------------------------------------------------------------------------------

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


class FunctionBody(Strict):
    """A function that the model may call."""

    name: ToolName
    description: Annotated[str, Field(max_length=65_536)] | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments, an object; null: any."""
    strict: bool | None = None
    """A hint: required and named calls always fit the schema, others are the model's own."""

    @property
    def schema_of_arguments(self) -> Mapping[str, Any]:
        """The schema that its arguments fit."""
        return {"type": "object", **(self.parameters or {})}


class Tool(Strict):
    """A function; there are no other tools."""

    type: Literal["function"]
    function: FunctionBody
    cache_control: Hint = None

    def for_template(self) -> dict[str, Any]:
        """Convert for chat templates, which show what they are given to the model."""
        shown = {"name": self.function.name, "description": self.function.description or "",
                 "parameters": self.function.parameters or {"type": "object", "properties": {}}}
        return {"type": "function", "function": shown}


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class NamedFunction(Strict):
    """The name of a function."""

    name: ToolName


class NamedTool(Strict):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


# -- messages --------------------------------------------------------------------------------------


class TextPart(Strict):
    """A piece of a message. Only text is supported."""

    type: Literal["text"]
    text: str
    cache_control: Hint = None
    annotations: Hint = None


class CalledFunction(Strict):
    """What the model called."""

    name: ToolName
    arguments: str
    """JSON text of an object."""

    def for_template(self) -> dict[str, Any]:
        """Convert for chat templates, which write the arguments themselves. Raises `ValueError`."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"arguments of the call of {self.name} are no JSON ({error})") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of the call of {self.name} are no JSON object")
        return {"name": self.name, "arguments": arguments}


class ToolCall(Strict):
    """A call of an earlier answer."""

    id: Annotated[str, Field(max_length=512)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Hint = None


Parts = Annotated[list[TextPart], Field(fail_fast=True, min_length=1)]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    """Null only beside tool calls."""
    name: Annotated[str, Field(max_length=128)] | None = None
    """Given to the chat template, which may ignore it."""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """Calls of the assistant."""
    tool_call_id: Annotated[str, Field(max_length=512)] | None = None
    """The call whose result this is."""
    cache_control: Hint = None
    annotations: Hint = None
    reasoning_content: str | None = None
    """Given to the chat template, which may ignore it."""
    refusal: Annotated[Any, Neutral("")] = None
    function_call: Annotated[Any, Neutral()] = None
    audio: Annotated[Any, Neutral()] = None

    def for_template(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Convert for chat templates: ``developer`` is the newer name of ``system``.

        Args:
            names: of the functions called before, by the calls' ids.
        """
        text = self.content if isinstance(self.content, str) else "\n".join(
            part.text for part in self.content or ())
        role = "system" if self.role == "developer" else self.role
        name = self.name or (names.get(self.tool_call_id or "") if role == "tool" else None)
        calls = [{"id": call.id, "type": "function", "function": call.function.for_template()}
                 for call in self.tool_calls or ()]
        others = {"name": name, "tool_calls": calls, "tool_call_id": self.tool_call_id,
                  "reasoning_content": self.reasoning_content}
        return {"role": role, "content": text,
                **{key: value for key, value in others.items() if value}}


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert a conversation for chat templates. Raises `ValueError` that says what is wrong."""
    names = dict[str, str]()
    made = list[dict[str, Any]]()
    for index, message in enumerate(messages):
        if message.content is None and not message.tool_calls:
            raise ValueError(f"messages.{index}.content is missing")
        if message.tool_calls and message.role != "assistant":
            raise ValueError(f"messages.{index}: tool_calls are the assistant's")
        names.update((call.id, call.function.name) for call in message.tool_calls or ())
        made.append(message.for_template(names))
    return made
