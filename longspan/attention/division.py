"""How the packed rows of one step are divided among ranks: which rows each has, the order in which
gathered keys arrive, and where the wanted outputs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.attention.ranks import RankGroup, RowShare, padded

_Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """A step of which at least one slice is split."""

    group: RankGroup
    split: _Rows
    """This rank's packed rows of slices that are split, [start, stop) each."""
    others: _Rows
    """Its packed rows that every rank has."""
    most: int
    """Rows of split slices on the rank that has most of them."""
    wanted: Tensor
    """[n] int64, for each wanted output this rank's row, 0 where it has none."""
    owners: Tensor
    """[n] int64, a rank that has it."""

    def begin(self, both: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begin to gather keys and values of the packed rows, [T, 2, K, D]. What is returned waits
        for those of all ranks, [S, K, D] each, in the order of the step's slots."""
        sent = [both[start:stop] for start, stop in self.split]
        gathering = self.group.begin_gather(
            padded(sent[0] if len(sent) == 1 else torch.cat(sent), self.most))

        def wait() -> tuple[Tensor, Tensor]:
            every = [gathering.wait().flatten(0, 1),
                     *(both[start:stop] for start, stop in self.others)]
            one = every[0] if len(every) == 1 else torch.cat(every)
            return one[:, 0], one[:, 1]

        return wait

    def outputs(self, hidden: Tensor) -> Tensor:
        """Collect the wanted rows from the ranks that have them: [T, M] to [n, M], on every
        rank."""
        count = self.wanted.shape[0]
        if not count:
            return hidden[:0]
        gathered = self.group.gather(hidden[self.wanted])
        return gathered[self.owners, torch.arange(count, device=hidden.device)]


class SharedSlice(NamedTuple):
    """One slice of a step, before it is divided."""

    share: RowShare | None
    """None: decodes, which every rank computes."""
    cached_len: int
    query_len: int
    num_outputs: int
    """Wanted rows, at the slice's end."""


class Divided(NamedTuple):
    """A division, and the order of the step's slots under it."""

    division: Division
    order: NDArray[np.int64]
    """For each key that is stored its row in the undivided step; -1: padding."""


def divide(group: RankGroup, slices: Sequence[SharedSlice]) -> Divided:
    """Divide a step. The slices are packed in their order, on every rank with the rows it has."""
    gathered = [list[NDArray[np.int64]]() for _ in range(group.size)]
    alone, split, others = list[NDArray[np.int64]](), list[tuple[int, int]](), (
        list[tuple[int, int]]())
    wanted, owners = list[int](), list[int]()
    whole = local = 0  # rows before the slice: in the undivided step, on this rank
    for item in slices:
        is_split = item.share is not None and item.share.is_split
        if item.share is None or not is_split:
            alone.append(np.arange(whole, whole + item.query_len))
            others.append((local, local + item.query_len))
            count = item.query_len
        else:
            for rank, rows in enumerate(gathered):
                rows += [np.arange(start, stop) - item.cached_len + whole
                         for start, stop in item.share.ranges[rank]]
            count = item.share.num_rows(group.rank)
            split.append((local, local + count))
        for row in range(item.query_len - item.num_outputs, item.query_len):
            rank, place = (0, row) if item.share is None or not is_split else (
                _owner(item.share, item.cached_len + row))
            owners.append(rank)
            has_it = not is_split or rank == group.rank
            wanted.append(local + place if has_it else 0)
        whole, local = whole + item.query_len, local + count
    lists = [np.concatenate(rows) for rows in gathered]
    most = max(map(len, lists))
    order = np.concatenate([
        *(np.pad(rows, (0, most - len(rows)), constant_values=-1) for rows in lists), *alone])
    return Divided(Division(
        group=group, split=tuple(split), others=tuple(others), most=most,
        wanted=torch.tensor(wanted, dtype=torch.int64),
        owners=torch.tensor(owners, dtype=torch.int64)), order)


def _owner(share: RowShare, position: int) -> tuple[int, int]:
    """Return the rank that has a position, and its place among that rank's rows of the slice."""
    for rank, ranges in enumerate(share.ranges):
        before = 0
        for start, stop in ranges:
            if start <= position < stop:
                return rank, before + position - start
            before += stop - start
    raise AssertionError(f"nobody has position {position} of {share.ranges}")
