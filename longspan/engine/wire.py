"""Messages between the callers' side and the engine's side. No torch.

Plain data, in order, each way through one queue, and nothing else is shared: whoever sends a
message gives up what is in it. Both sides are in one process now; a transport between processes
needs an encoding of these classes and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from longspan.engine.desk import Intake
from longspan.engine.loop import StepReport
from longspan.engine.request import Request
from longspan.engine.scheduler import Load

# -- to the engine ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Add:
    """Compute this request. Its id is never used again."""

    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget a request, whatever its state; takes effect before the next step."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Close:
    """End after the step that is being computed."""


ToEngine = Add | Abort | Close

# -- from the engine -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What the engine will be; sent before the weights are read."""

    path: Path
    """Directory of the checkpoint, for the tokenizer."""
    intake: Intake
    capacity_tokens: int
    """Tokens that the KV cache holds."""
    prefill_chunk_len: int
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """Weights, workspace, KV cache."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Requests are computed from now on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """A step that prefills has begun."""

    prefills: tuple[tuple[str, int], ...]
    """Id of each request that is being prefilled, and its tokens in the KV cache before."""
    load: Load


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """A step has ended."""

    report: StepReport
    load: Load


@dataclass(frozen=True, slots=True)
class Died:
    """The last message: nothing is computed any more."""

    reason: str


FromEngine = Planned | Loaded | Submitted | Stepped | Died
