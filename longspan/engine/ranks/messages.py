"""Messages between rank 0 and the others, and what each rank tells of itself. No torch."""

from __future__ import annotations

from typing import Any

import msgspec

from longspan.engine.processes.wire import Message, Step
from longspan.engine.step import ScheduledBatch, StepResult


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What must fit together, or decides what the group can do."""

    host: str
    """Names the machine and its boot: ranks of one share its memory."""
    device: str
    total_bytes: int
    """The device's memory."""
    free_bytes: int
    """What is free of it, for all ranks of the machine where it is the host's."""
    versions: dict[str, str]
    """Versions of longspan, torch and its compilers."""
    checkpoint: str
    """Digest of config, weights and plan."""
    options: dict[str, Any]
    """What was asked for and must be the same everywhere."""
    backend: str
    """``gloo`` or ``nccl``; empty: this torch has not what the device needs."""


class Hello(Message, frozen=True):
    """A rank is there; its first message."""

    token: str
    """Known to the ranks of one group alone."""
    rank: int
    facts: Facts


class Refused(Message, frozen=True):
    """The ranks do not fit together; the last message."""

    reason: str


class Welcome(Message, frozen=True):
    """Load this engine."""

    engine: bytes
    store: str
    """Where torch.distributed meets: ``file:<path>`` or ``tcp:<host>:<port>``."""


class Joined(Message, frozen=True):
    """The rank has loaded the engine."""


class Compute(Message, frozen=True):
    """Compute this step."""

    step: Step


class Computed(Message, frozen=True):
    """What a rank of a pipeline knows of a step that it has computed its layers of."""

    result: StepResult


class Finish(Message, frozen=True):
    """Take back the rows of this step, and of those before it, and sample: for the ranks that share
    the heads of a pipeline's first stage with rank 0, in the order in which it does."""

    step_id: int


class RecordGraphs(Message, frozen=True):
    """Record the decode graphs."""


class CompileAhead(Message, frozen=True):
    """Compute these steps for what they compile."""

    steps: tuple[ScheduledBatch, ...]


class Trace(Message, frozen=True):
    """Note from now on when steps are computed; or tell it, and note no more."""

    is_on: bool


class Traced(Message, frozen=True):
    """When a rank computed each step since `Trace`: begin and end, seconds."""

    spans: tuple[tuple[float, float], ...]


class Beat(Message, frozen=True):
    """Still there."""


class Failed(Message, frozen=True):
    """The rank, or the group, has ended for this reason; the last message."""

    reason: str


class Bye(Message, frozen=True):
    """An orderly end; the last message."""


ToFollower = (Refused | Welcome | Compute | Finish | RecordGraphs | CompileAhead | Trace | Beat
              | Failed | Bye)
ToLead = Hello | Joined | Computed | Traced | Beat | Failed


def differences(facts: list[Facts]) -> str:
    """Say in one line what does not fit together; empty: it all does."""
    first = facts[0]
    for rank, other in enumerate(facts):
        if not other.backend:
            missing = "NCCL" if other.device.startswith("cuda") else "gloo"
            return (f"rank {rank}: this PyTorch has no {missing}, by which ranks on "
                    f"{other.device} exchange tensors; install a build that has it")
        for name, wanted in first.versions.items():
            found = other.versions.get(name, "none")
            if found != wanted:
                return (f"rank {rank} has {name} {found}, rank 0 has {wanted}; install the same "
                        "version everywhere")
        for name, value in first.options.items():
            if other.options.get(name) != value:
                return (f"rank {rank} was started with {name} {other.options.get(name)!r}, rank 0 "
                        f"with {value!r}; start all ranks alike")
        if other.checkpoint != first.checkpoint:
            return (f"rank {rank} has another checkpoint than rank 0 ({other.checkpoint[:8]}, not "
                    f"{first.checkpoint[:8]}): config, weights or sparsity plan differ; copy one "
                    "to all machines")
        if other.device.split(":")[0] != first.device.split(":")[0]:
            return (f"rank {rank} computes on {other.device}, rank 0 on {first.device}; use one "
                    "kind of device")
    places = dict[tuple[str, str], int]()
    for rank, other in enumerate(facts):
        place = other.host, other.device
        if other.device.startswith("cuda") and place in places:
            return (f"ranks {places[place]} and {rank} have the same GPU, {other.device}; start "
                    "no more ranks on a machine than it has GPUs")
        places[place] = rank
    return ""


def least_memory(facts: list[Facts]) -> tuple[int, int]:
    """Return the total and free bytes that every rank has: on CPUs ranks of one machine share."""
    sharers = [sum(other.host == one.host for other in facts)
               if one.device == "cpu" else 1 for one in facts]
    return (min(one.total_bytes // count for one, count in zip(facts, sharers, strict=True)),
            min(one.free_bytes // count for one, count in zip(facts, sharers, strict=True)))
