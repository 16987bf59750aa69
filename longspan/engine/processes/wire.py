"""Messages between front end, scheduler and runner, and their encoding. No torch.

Each process has one inbox, to which the others send frames, and nothing else is shared. A frame is
one message in MessagePack, checked against the classes below when it is read: nothing in it is ever
executed, and a frame that fits no class raises `BadFrameError`.

Stale frames do no harm: engine-side request ids are never used twice, and steps and their results
carry the scheduler's epoch, which moves when it forgets what is in flight.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

import msgspec

from longspan.engine.control.scheduler import Load, SchedulerConfig
from longspan.engine.intake import Intake
from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.request import Request
from longspan.engine.step import ScheduledBatch, StepResult
from longspan.errors import LongspanError, RankLostError

MAX_FRAME_BYTES = 256 * 1024**2
"""A prompt of a million tokens takes 4 MB, and some schemas and biases with it."""
logger = logging.getLogger("longspan.engine")


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of messages: encoded as a list whose first item names the class."""


# -- to the scheduler ------------------------------------------------------------------------------


class Begin(Message, frozen=True):
    """Begin to schedule for an engine of these sizes; the first command."""

    config: SchedulerConfig


class Add(Message, frozen=True):
    """Compute this request. Its id is never used again."""

    request: Request


class Abort(Message, frozen=True):
    """Cancel a request, whatever its state; takes effect before the next step."""

    request_id: str


class Close(Message, frozen=True):
    """End after the step that is being computed."""


Command = Add | Abort | Close
ToScheduler = Begin | Add | Abort | Close | StepResult
"""Commands of the front end, and the runner's results."""

# -- to the runner ---------------------------------------------------------------------------------


class Step(Message, frozen=True):
    """Compute this step. Block tables that the runner has are left out of the slices."""

    batch: ScheduledBatch
    tables: dict[str, bytes]
    """By request id: new and grown block tables, as bytes of 32-bit integers."""


class Prepare(Message, frozen=True):
    """Compile a constraint before the request comes that follows it; to a thread of its own."""

    constraint: str


# -- to the front end ------------------------------------------------------------------------------


class Described(Message, frozen=True, kw_only=True):
    """The engine as it will be; sent before the weights are read."""

    path: Path
    """The checkpoint's directory, for the tokenizer."""
    intake: Intake
    scheduler: SchedulerConfig
    memory_bytes: Mapping[str, int] = {}
    """Sizes of weights, workspace and KV cache."""
    sizes_reason: str = ""
    """See `longspan.engine.setup.engine_plan.ResolvedEngine`."""


class Loaded(Message, frozen=True):
    """Steps are computed from now on."""


class Submitted(Message, frozen=True):
    """A step that prefills is handed to the runner."""

    prefills: tuple[tuple[str, int], ...]
    """Id of each request in prefill, and its tokens in the KV cache before the step."""


class LoadChanged(Message, frozen=True):
    """The scheduler's work has changed. The first one says that the scheduler is there."""

    load: Load


class ComputedSlice(msgspec.Struct, frozen=True, array_like=True):
    """One request's part in a computed step."""

    request_id: str
    cached_len: int
    """Tokens in the KV cache before."""
    computed_len: int
    """Tokens there now; a paused prefill chunk counts in proportion."""
    samples: bool
    """The result holds a token of this request."""
    origin: PrefixOrigin | None = None
    """As in the slice."""


def computed_slices(batch: ScheduledBatch) -> tuple[ComputedSlice, ...]:
    """List a step's slices as the front end needs them."""
    return tuple([ComputedSlice(item.request_id, item.cached_len, item.done_len,
                                item.sampling is not None, item.origin)
                  for item in batch.slices])


class Stepped(Message, frozen=True, kw_only=True):
    """A step has ended. Comes straight from the runner, so that no text waits for the scheduler."""

    slices: tuple[ComputedSlice, ...]
    """Those of the first step, where the result has repeats."""
    result: StepResult
    started_s: float
    """By ``time.monotonic``, which all processes of one machine share."""
    finished_s: float


class Prepared(Message, frozen=True):
    """A constraint is compiled, or cannot be, which its request will be told."""

    constraint: str


class Died(Message, frozen=True):
    """The engine has ended; the last message."""

    reason: str
    is_mendable: bool = False
    """The reason tells a person what to do about it."""


FromEngine = Described | Loaded | Submitted | LoadChanged | Stepped | Prepared | Died

# -- encoding --------------------------------------------------------------------------------------


class BadFrameError(Exception):
    """A frame that is no message for this inbox."""


class Codec:
    """Frames of one inbox.

    Args:
        kind: the messages that the inbox takes, a union.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind, dec_hook=_from_plain)

    def decode(self, frame: bytes) -> Any:
        """Decode a message. Raises `BadFrameError` for anything else."""
        try:
            return self._decoder.decode(frame)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadFrameError(f"{len(frame)} bytes: {error}") from None


def encode(message: Message | StepResult) -> bytes:
    """Encode a message as a frame."""
    return _ENCODER.encode(message)


def _to_plain(value: object) -> object:
    if isinstance(value, array):
        return value.tobytes()
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)  # the error that msgspec expects


def _from_plain(kind: type, value: Any) -> object:
    if kind is array or get_origin(kind) is array:
        items: array[int] = array("i")
        items.frombytes(value)
        return items
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind.__name__)  # as above


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_plain)


def last_words(error: BaseException) -> Died:
    """Say in one line why an engine ends. An error that only a programmer can mend is logged in
    full."""
    if isinstance(error, LongspanError):
        is_mendable = not isinstance(error, RankLostError)
        return Died(" ".join(str(error).split()), is_mendable=is_mendable)
    logger.error("the engine failed", exc_info=error)
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return Died(f"{type(error).__name__}: {first_line}")
