"""Context parallelism: several ranks compute the rows of each prefill slice together.

Every rank has the whole model, and the whole KV cache or its part of each block
(`longspan.attention.divided_kv`). Of a slice that is long enough each rank
computes some rows: projections, attention, MLP. Keys and values of all rows are gathered in every
layer, so that each rank's cache stays whole; keys are selected by heads, each rank for its own
ones, over the queries of all rows. What is short is computed by every rank, and so are decodes. A
product may round such rows otherwise on a rank that has fewer others beside them, so the first
rank's tokens are those of all: else two ranks might go on from different ones at a near tie.

Here are the parts that need no process: who has which rows and heads, and what is exchanged
through a `RankGroup`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.spare_sms import spare_sms
from longspan.attention.sparsity import SparsityPlan

Range = tuple[int, int]
"""Positions or rows [start, stop)."""

_all_gather: Callable[..., dist.Work | None] = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name is younger than 2.11


class Gathering(NamedTuple):
    """A gathering under way."""

    work: dist.Work
    gathered: Tensor
    like: Tensor

    def wait(self) -> Tensor:
        """Return what all ranks gave, [ranks, ...]. On GPUs it is the stream that waits."""
        self.work.wait()
        return self.gathered.view(self.like.dtype).view(-1, *self.like.shape)


class Summing(NamedTuple):
    """A sum under way."""

    work: dist.Work
    summed: Tensor

    def wait(self) -> Tensor:
        """Return the sum. On GPUs it is the stream that waits."""
        self.work.wait()
        return self.summed


class Swapping(NamedTuple):
    """Tensors on their way between ranks."""

    works: Sequence[dist.Work]
    ops: Sequence[dist.P2POp]
    """Hold what is sent until it has been."""

    def wait(self) -> None:
        """Return when they have arrived. On GPUs it is the stream that waits."""
        for work in self.works:
            work.wait()


class RankGroup:
    """The ranks that compute every step together, and how they exchange tensors: as bytes, so that
    any dtype will do. All ranks call the same methods in the same order.

    Args:
        processes: made by torch.distributed; None: the default group.
        num_sms: SMs that an exchange takes at the most, where that is known.
    """

    def __init__(
        self, rank: int, size: int, processes: dist.ProcessGroup | None = None, *,
        num_sms: int = 0,
    ) -> None:
        assert 0 <= rank < size
        self.rank, self.size, self._processes, self._num_sms = rank, size, processes, num_sms

    def beside(self) -> AbstractContextManager[None]:
        """Return a context whose matrix products run beside exchanges that are under way."""
        return spare_sms(self._num_sms)

    def begin_gather(self, x: Tensor) -> Gathering:
        """Begin to gather tensors of one shape from all ranks, beside what this rank computes."""
        x = x.contiguous()
        sent = _as_bytes(x)
        gathered = torch.empty(self.size * sent.numel(), dtype=torch.uint8, device=x.device)
        work = _all_gather(gathered, sent, group=self._processes, async_op=True)
        assert work is not None
        return Gathering(work, gathered, x)

    def gather(self, x: Tensor) -> Tensor:
        """Gather tensors of one shape from all ranks: [...] to [ranks, ...]."""
        return self.begin_gather(x).wait()

    def of_first(self, x: Tensor) -> Tensor:
        """Return what the first rank has of a small tensor."""
        return self.gather(x)[0]

    def begin_swap(
        self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]],
    ) -> Swapping:
        """Begin to send ``sent[r]`` to each other rank r and to fill ``received[r]`` with what it
        sends here, tensor by tensor, beside what this rank computes. All are contiguous; those of
        this rank itself are left alone."""
        ops = [dist.P2POp(op, _as_bytes(x), group=self._processes, group_peer=rank)
               for op, every in ((dist.isend, sent), (dist.irecv, received))
               for rank, parts in enumerate(every) if rank != self.rank for x in parts]
        return Swapping(dist.batch_isend_irecv(ops) if ops else [], ops)

    def begin_sum(self, x: Tensor) -> Summing:
        """Begin to add a tensor up over all ranks, in place, beside what this rank computes."""
        work = dist.all_reduce(x, group=self._processes, async_op=True)
        assert work is not None
        return Summing(work, x)

    def sum(self, x: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place."""
        dist.all_reduce(x, group=self._processes)
        return x


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def share_rows(
    start: int, stop: int, unit: int, size: int, *, are_alike: bool = False,
) -> tuple[tuple[Range, ...], ...]:
    """Divide positions [start, stop) among ``size`` ranks, at multiples of ``unit``.

    Each rank gets an early and a late piece of the same length, up to a unit: later queries see
    more keys. Returns each rank's ranges in ascending order, neighbours joined; one with fewer
    units than pieces may leave a rank without any.

    Args:
        are_alike: rows cost the same wherever they stand; then each rank gets one piece.
    """
    first, last = start // unit, -(-stop // unit)
    pieces = size if are_alike else 2 * size
    cuts = [min(max(start, (first + index * (last - first) // pieces) * unit), stop)
            for index in range(pieces)] + [stop]
    if are_alike:
        return tuple((piece,) for piece in pairwise(cuts))
    return tuple(
        _joined((cuts[rank], cuts[rank + 1]), (cuts[pieces - 1 - rank], cuts[pieces - rank]))
        for rank in range(size))


def _joined(early: Range, late: Range) -> tuple[Range, ...]:
    if early[1] == late[0]:
        return ((early[0], late[1]),)
    return tuple(part for part in (early, late) if part[0] < part[1])


class HeadPart(NamedTuple):
    """Consecutive query heads, of whole KV heads or of some part of one."""

    heads: Range
    kv_heads: Range


def share_heads(num_heads: int, num_kv_heads: int, size: int) -> list[Range]:
    """Divide query heads among ranks: KV heads whole where that is as even."""
    group = num_heads // num_kv_heads
    unit = group if num_kv_heads % size == 0 else 1
    count = num_heads // unit
    return [(rank * count // size * unit, (rank + 1) * count // size * unit)
            for rank in range(size)]


def head_parts(heads: Range, group: int) -> list[HeadPart]:
    """Part query heads into those of whole KV heads, together, and the incomplete ones at either
    end.

    Args:
        group: query heads of one KV head.
    """
    start, stop = heads
    whole = -(-start // group) * group, stop // group * group
    if whole[0] >= whole[1]:
        cuts = sorted({start, stop, min(max(whole[0], start), stop)})
    else:
        cuts = sorted({start, *whole, stop})
    return [HeadPart((low, high), (low // group, -(-high // group)))
            for low, high in zip(cuts, cuts[1:], strict=False)]


def row_unit(plan: SparsityPlan | None, block_size: int) -> int:
    """Return the rows that no cut parts: a tile of sparse attention, and no fewer than a kernel's
    query tile where those are aligned. 0: rows cannot be divided, for in ``paper`` mode query tiles
    are counted from wherever a segment begins."""
    return block_size if plan is None or plan.mode == "tile" else 0


def total(group: RankGroup, counted: Tensor | float, device: str) -> Tensor:
    """Add up what each rank has counted of its own rows or heads, fp64."""
    return group.sum(torch.as_tensor(counted, dtype=torch.float64, device=device).clone())


class Exchange(NamedTuple):
    """An exchange of queries under way."""

    by_owner: Mapping[int, Tensor]
    """This rank's rows of each rank's heads, [n, h, D]."""
    wait: Callable[[], Tensor]
    """Waits for this rank's heads of all rows, [T, h, D]."""

    def whole(self) -> Tensor:
        """Return all heads of this rank's rows, [n, H, D]."""
        return torch.cat([self.by_owner[rank] for rank in sorted(self.by_owner)], dim=1)


LEAST_ROWS = {"cpu": 0, "cuda": 2_048}
"""Fewer rows than that, with less than `FAR` before them, are computed by every rank: launches and
exchanges for a part of them take the host longer than an H200 needs for all."""
FAR = 2**18
"""So many tokens before them make a selection longer than its launches."""


class RowSharing(NamedTuple):
    """How a group shares prefill slices out, and the keys of decodes."""

    group: RankGroup
    unit: int
    """Rows are cut at multiples of it, tokens; 0: never. See `row_unit`."""
    least_keys: int
    """A step whose decodes see fewer keys than this in all is not worth the exchange: every rank
    computes it."""
    least_rows: int = 0
    """See `LEAST_ROWS`. No effect with ``divides_kv``: no rank has all keys."""
    divides_kv: bool = False
    """Each rank's cache holds a part of every block alone (`longspan.attention.divided_kv`), and no
    step's decodes are computed by every rank."""

    def share(
        self, start: int, stop: int, *, may_split: bool, sparse: bool = False,
    ) -> RowShare:
        """Divide the rows of a slice if that may be and every rank gets a piece of each kind.

        Rows of a sparse slice keep about as many keys wherever they stand, once there is as much
        history as rows. One piece each takes half of the launches, for which short slices wait.
        """
        size = self.group.size
        is_long = self.divides_kv or stop - start >= self.least_rows or start >= FAR
        is_split = may_split and is_long and 0 < 2 * size * self.unit <= stop - start
        ranges = share_rows(
            start, stop, self.unit, size, are_alike=sparse and stop - start <= start,
        ) if is_split else (((start, stop),),) * size
        return RowShare(group=self.group, ranges=ranges, is_split=is_split, unit=self.unit,
                        divides_kv=self.divides_kv)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShare:
    """Who computes which rows of one prefill slice."""

    group: RankGroup
    ranges: tuple[tuple[Range, ...], ...]
    """Positions of each rank's rows, ascending."""
    is_split: bool
    """False: every rank computes all rows."""
    unit: int
    """Ranges are cut at multiples of it."""
    divides_kv: bool = False
    """See `RowSharing`."""

    @property
    def own(self) -> tuple[Range, ...]:
        """Positions of the rows on this rank."""
        return self.ranges[self.group.rank]

    @property
    def counts(self) -> bool:
        """Whether this rank counts its pairs: each is to be counted once."""
        return self.is_split or self.group.rank == 0

    def num_rows(self, rank: int) -> int:
        """Count the rows of a rank."""
        return sum(stop - start for start, stop in self.ranges[rank])

    def local_cuts(self, num_pieces: int) -> list[int]:
        """Part this rank's rows, counted from 0, into so many pieces, of whole units."""
        count = self.num_rows(self.group.rank)
        return [min(count, index * count // num_pieces // self.unit * self.unit)
                for index in range(num_pieces)] + [count]

    def begin_to_heads(
        self, queries: Callable[[slice], Tensor], num_heads: int, num_kv_heads: int,
    ) -> Exchange:
        """Begin to exchange queries: all heads of this rank's rows for this rank's heads of all
        rows of the slice. Those of other ranks' heads are made first, rank by rank around the ring,
        and travel while the next ones are made.

        Args:
            queries: makes those of this rank's rows and some heads, [n, h, D].
        """
        rank, size = self.group.rank, self.group.size
        heads = [slice(*each) for each in share_heads(num_heads, num_kv_heads, size)]
        found, swaps, lengths = dict[int, Tensor](), list[Swapping](), [b - a for a, b in self.own]
        every, places = torch.empty(0), list[list[Tensor]]()
        for step in range(1, size + 1):  # its own heads at last: a group of one has no others
            target, source = (rank + step) % size, (rank - step) % size
            part = found[target] = queries(heads[target])
            if step == 1:  # only a product tells the type
                every = part.new_empty(sum(map(self.num_rows, range(size))),
                                       heads[rank].stop - heads[rank].start, part.shape[2])
                places = [self._places(each, every) for each in self.ranges]
            if target == rank:
                for place, rows in zip(places[rank], part.split(lengths), strict=True):
                    place.copy_(rows)
                break
            part = found[target] = part.contiguous()
            none = [list[Tensor]() for _ in range(size)]
            swaps.append(self.group.begin_swap(
                [*none[:target], list(part.split(lengths)), *none[target + 1:]],
                [*none[:source], places[source], *none[source + 1:]]))

        def wait() -> Tensor:
            for swap in swaps:
                swap.wait()
            return every

        return Exchange(found, wait)

    def _places(self, ranges: tuple[Range, ...], rows: Tensor) -> list[Tensor]:
        """Return the part of the slice's rows in each of some ranges of positions: views."""
        first = self.ranges[0][0][0]
        return [rows[start - first : stop - first] for start, stop in ranges]

    def from_heads(self, parts: Sequence[Tensor], num_heads: int, num_kv_heads: int
                   ) -> list[Tensor]:
        """Gather what every rank has found for its heads, [h, ...] each, to [H, ...] each."""
        heads = share_heads(num_heads, num_kv_heads, self.group.size)
        counts = [stop - start for start, stop in heads]
        most = max(counts)
        flat = [_as_bytes(padded(part, most).contiguous()) for part in parts]
        gathered = self.group.gather(torch.cat(flat)).split([len(part) for part in flat], 1)
        found = list[Tensor]()
        for every, part in zip(gathered, parts, strict=True):
            shape = len(every) * most, *part.shape[1:]  # of width 0 where no head keeps columns
            rows = every.contiguous().view(part.dtype).view(shape)  # a copy, so it is aligned
            found.append(rows if most == min(counts) else torch.cat(
                [items[:count] for items, count in zip(rows.split(most), counts, strict=True)]))
        return found


def padded(x: Tensor, rows: int) -> Tensor:
    """Return ``x`` with rows of zeros behind it, ``rows`` in all."""
    if x.shape[0] == rows:
        return x
    wide = x.new_zeros(rows, *x.shape[1:])
    wide[: x.shape[0]] = x
    return wide
