"""Block tables on both sides of a connection. No torch."""

from __future__ import annotations

from array import array

from msgspec.structs import force_setattr, replace

from longspan.engine.processes.wire import Step
from longspan.engine.step import ScheduledBatch


class BlockTableCache:
    """Block tables of the requests in each slot, kept on both sides of the wire: a table of a
    million tokens travels once, not with each token."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, array[int]]] = {}

    def strip(self, batch: ScheduledBatch) -> Step:
        """On the sender's side, leave out the tables that the other side has."""
        tables: dict[str, bytes] = {}
        for item in batch.slices:
            known = self._known.get(item.slot)
            if known is None or known[0] != item.request_id or len(known[1]) != len(item.block_ids):
                table = array("i", item.block_ids)
                self._known[item.slot] = item.request_id, table
                tables[item.request_id] = table.tobytes()
        slices = tuple([replace(item, block_ids=()) for item in batch.slices])
        return Step(replace(batch, slices=slices), tables)

    def restore(self, step: Step) -> ScheduledBatch:
        """On the receiver's side, put the tables back."""
        for item in step.batch.slices:
            if item.request_id in step.tables:
                table = array("i")
                table.frombytes(step.tables[item.request_id])
                self._known[item.slot] = item.request_id, table
            owner, table = self._known[item.slot]
            assert owner == item.request_id, "a slot's table is sent with its owner's first slice"
            # The slice was just decoded, and nothing else holds it. A copy of each slice in each
            # step would cost more than all the rest of the way.
            force_setattr(item, "block_ids", table)
        return step.batch
