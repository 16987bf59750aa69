"""JSON schemas and grammars on their way to the runner: checked within limits, then compiled there,
before the requests are handed in that follow them. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from longspan.engine.processes.schema_checker import SchemaChecker
from longspan.engine.processes.wire import Prepare


class Constraints:
    """The constraints of one engine's requests. All methods belong to one event loop.

    Args:
        path: the checkpoint's directory.
        vocab_size: number of the model's logits.
        send: takes what the runner is to prepare.
    """

    def __init__(self, path: Path, vocab_size: int, send: Callable[[Prepare], None]) -> None:
        self._checker = SchemaChecker(path, vocab_size)
        self._send = send
        self._waiting = dict[str, asyncio.Future[None]]()

    async def admit(self, constraint: str) -> None:
        """Return when the runner has it ready, so that no running answer waits while it is
        compiled. Raises as `SchemaChecker.check`."""
        await self._checker.check(constraint)
        # Asked for each time, for only the runner knows what it still has.
        waiting = self._waiting.get(constraint)
        if waiting is None:
            waiting = self._waiting[constraint] = asyncio.get_running_loop().create_future()
            self._send(Prepare(constraint))
        await asyncio.shield(waiting)

    def arrive(self, constraint: str) -> None:
        """Note that the runner has prepared it."""
        waiting = self._waiting.pop(constraint, None)
        if waiting is not None:
            waiting.set_result(None)

    def close(self) -> None:
        """End the checks. Calls that wait return: the engine's state says what became of it."""
        self._checker.close()
        for constraint in list(self._waiting):
            self.arrive(constraint)
