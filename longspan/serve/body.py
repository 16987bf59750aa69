"""Reading a request's body within limits, and noticing that its sender has gone."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from longspan.serve.errors import ApiError, ClientGone
from longspan.serve.long_lists import LONG_BYTES, take_out
from longspan.serve.messages import NOT_SUPPORTED
from longspan.serve.packed import mend_surrogates, unpacker

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
MAX_MESSAGE_LEN = 300
SLOWEST_BYTES_PER_S = 4096
"""Bytes per second below which a client that keeps sending is refused."""


def announced_bytes(request: Request) -> int:
    """Return Content-Length, 0 when there is none. Raises 400 unless it is a number."""
    text = request.headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit()):
        raise ApiError(400, "Content-Length is not a number.")
    return int(text)


def check_media_type(request: Request) -> None:
    """Raise 415 unless the body is declared as JSON: a page of another origin cannot declare that
    without a preflight request, which is not answered (`longspan.serve.hosts` checks origins)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send Content-Type: application/json.")


async def read_body(request: Request, take: Callable[[int], None], timeout_s: float) -> bytes:
    """Read the whole body, unpacked. ``take`` counts each piece and raises when it is too much.

    Raises 408 for a silence of ``timeout_s``, or for drops that keep the body coming for longer
    than that; 415 for an encoding other than gzip; `ClientGone` if the sender hangs up.
    """
    pieces = list[bytes]()
    unpack = unpacker(request.headers.get("content-encoding", ""))
    clock = asyncio.get_running_loop().time
    end_s = clock() + timeout_s
    while True:
        try:
            async with asyncio.timeout_at(min(clock() + timeout_s, end_s)):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(408, f"The request body did not arrive: nothing for {timeout_s:g} s, or "
                           f"less than {SLOWEST_BYTES_PER_S} bytes a second for as long.",
                           headers={"Connection": "close"}) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        packed, is_last = message.get("body", b""), not message.get("more_body", False)
        for piece in unpack(packed, is_last):
            take(len(piece))
            pieces.append(piece)
        end_s += len(packed) / SLOWEST_BYTES_PER_S
        if is_last:
            return b"".join(pieces)


async def parse_aside(model: type[Model], body: bytes) -> Model:
    """Parse a body as `parse`; a long one does not hold up the event loop all the time."""
    if len(body) < LONG_BYTES:
        return parse(model, body)
    return await asyncio.to_thread(_parse_long, model, body)


def _parse_long(model: type[Model], body: bytes) -> Model:
    rest, lists = take_out(body)
    if not lists:
        return parse(model, body)
    # The short list in its place is refused too, where the schema allows no list.
    checked = parse(model, rest)
    return checked.model_copy(update={
        # a checked prompt is a list of prompts, which are arrays here
        name: [ids] if isinstance(getattr(checked, name)[0], array) else ids
        for name, ids in lists.items()})


def parse(model: type[Model], body: bytes) -> Model:
    """Check a request. Raises 400 that names the field at fault."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        mended = mend_surrogates(body) if _is_no_json(error) else body
        if mended == body:
            raise _explain(error) from None
    return parse(model, mended)


def _is_no_json(error: ValidationError) -> bool:
    (fault, *_) = error.errors(include_url=False, include_context=False, include_input=False)
    return fault["type"] == "json_invalid"


def _explain(error: ValidationError) -> ApiError:
    """Describe the first fault; of a union's, the one that got furthest into the value."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    fault = max(faults, key=lambda item: (item["loc"][:1] == faults[0]["loc"][:1],
                                          len(item["loc"])))
    if fault["type"] == "value_error":
        fault["msg"] = fault["msg"].removeprefix("Value error, ")
    names = [str(part) for part in fault["loc"] if not _is_union_branch(part)]
    param = ".".join(names) or None
    if fault["type"] == NOT_SUPPORTED:
        text = f"{param} is not supported by this server with this value; leave it out."
    elif fault["type"] == "extra_forbidden":
        text = f"{param} is not a known field of this request."
    elif fault["type"] == "json_invalid":
        text = f"The body is not valid JSON: {fault['msg']}."
    else:
        text = f"{param or 'The body'}: {fault['msg']}."
    return ApiError(400, text[:MAX_MESSAGE_LEN], param=param)


def _is_union_branch(part: int | str) -> bool:
    """Return whether a part of a fault's place is the type of a union's branch, not a field."""
    return isinstance(part, str) and ("[" in part or part in (
        "str", "int", "float", "bool", "TextPart", "literal"))


class Disconnect:
    """Watches one connection, once the body is read; everything that waits races against it."""

    def __init__(self, receive: Callable[[], Awaitable[Any]]) -> None:
        self._task = asyncio.create_task(_wait_for_disconnect(receive))

    async def race(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return the result of ``work``. Raises `ClientGone` once the work is cancelled."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self._task), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            return task.result()
        finally:
            await cancel(task)

    async def race_for(self, task: asyncio.Task[Result], timeout_s: float) -> bool:
        """Wait for a task that goes on afterwards; True if it is done. Raises `ClientGone`."""
        await asyncio.wait(
            (task, self._task), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and self._task.done():
            raise ClientGone
        return task.done()

    async def close(self) -> None:
        """Stop watching."""
        await cancel(self._task)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have cleaned up; their results are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _wait_for_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
