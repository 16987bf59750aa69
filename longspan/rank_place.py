"""A process's place among those that torchrun has started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longspan.errors import LongspanError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


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

    def check(self, context_parallel: int) -> None:
        """Raise `LongspanError` unless so many ranks are what was started."""
        if context_parallel not in (1, self.size):
            raise LongspanError(
                f"--cp {context_parallel}, and torchrun has started {self.size} processes; leave "
                f"--cp out, or start {context_parallel}")
