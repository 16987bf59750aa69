"""A process's place among those that torchrun has started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from longspan.errors import LongspanError

FLAGS = {"context_parallel": "--cp", "pipeline_parallel": "--pp", "tensor_parallel": "--tp"}
"""What ranks share, and how it is asked for."""
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def in_flags(sizes: Mapping[str, int]) -> str:
    """Write by how many ranks what is shared as it is asked for: ``--cp 2 --tp 2``."""
    return " ".join(f"{FLAGS[name]} {size}" for name, size in sizes.items() if size > 1)


def ranks_label(sizes: Mapping[str, int]) -> str:
    """Say how many ranks there are and what they share; empty: there is one."""
    count = prod(sizes.values())
    return f"{count} ({in_flags(sizes)}); the memory is that of one" if count > 1 else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """One rank of several that were started together, perhaps on several machines."""

    rank: int
    size: int
    local_rank: int
    """Its number among those of its machine."""
    local_size: int
    address: str
    """Host of rank 0."""
    port: int
    """Where they meet on it."""
    has_store: bool
    """torchrun's own store listens there, so rank 0 needs another port."""

    @classmethod
    def find(cls, variables: Mapping[str, str]) -> RankPlace | None:
        """Read torchrun's environment variables; None: torchrun has not started this process, or it
        alone.

        Raises `LongspanError` where some are missing or no numbers.
        """
        if "RANK" not in variables or variables.get("WORLD_SIZE", "1") == "1":
            return None
        values = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **variables}
        try:
            rank, size, local_rank, local_size, port = (int(values[name]) for name in _NUMBERS)
            address = values["MASTER_ADDR"]
        except (KeyError, ValueError) as error:
            raise LongspanError(
                f"RANK is set, as torchrun does, but {error} is missing or no number among "
                f"{', '.join(_NUMBERS)}, MASTER_ADDR; start with torchrun, or unset RANK") from None
        if not 0 <= rank < size:
            raise LongspanError(f"RANK is {rank}, and WORLD_SIZE {size}; ranks count from 0")
        return cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size,
                   address=address, port=port,
                   has_store=values.get("TORCHELASTIC_USE_AGENT_STORE") == "True")

    def sharing(self, options: Mapping[str, Any]) -> dict[str, int]:
        """Return by how many ranks what is shared, under the names in `EngineConfig`: as asked for;
        where nothing is, all of them share rows.

        Raises `LongspanError` unless as many ranks as are asked for were started.
        """
        asked = {name: int(options[name]) for name in FLAGS}
        count = prod(asked.values())
        if count == 1:
            return {**asked, "context_parallel": self.size}
        if count != self.size:
            one = " ".join(FLAGS[name] for name, value in asked.items() if value > 1)
            raise LongspanError(
                f"{in_flags(asked)}, and torchrun has started {self.size} processes; leave {one} "
                f"out, or start {count}")
        return asked
