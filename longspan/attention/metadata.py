"""Where each query of one step stands: device tensors and host integers, built from lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.attention.divided_kv import held_slots
from longspan.attention.division import Division, SharedSlice, divide
from longspan.attention.ranks import Range, RowShare, RowSharing
from longspan.attention.recall import RecallMeter
from longspan.attention.rope import yarn_temperature
from longspan.attention.shared_decode import KeyShare, share_keys
from longspan.attention.upload import upload
from longspan.config import DcaConfig
from longspan.ops.select.recall import num_typical
from longspan.ops.types import Selection

_NO_BLOCKS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillSlice:
    """Consecutive prompt tokens of one request computed in this step."""

    start: int
    """First row of the slice in the step's packed tokens."""
    query_len: int
    cached_len: int
    """Tokens of this request already in the KV cache: the slice's first position."""
    prompt_len: int
    """Whole prompt, tokens; the YaRN temperature is that of its length."""
    block_table: Tensor
    """[ceil(context_len / P)] int64, KV block ids in order."""
    scale: float
    """Softmax scale, with the YaRN attention temperature in it."""
    sparse: bool
    recall: RecallMeter | None = None
    """Takes what the layers measure, where the slice is sparse."""
    share: RowShare | None = None
    """Which rows are computed here, and by whom the others; None: there is one rank."""

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Positions of the slice's rows that are computed here, in their packed order."""
        return ((self.cached_len, self.context_len),) if self.share is None else self.share.own

    @property
    def num_rows(self) -> int:
        """Packed rows of the slice here."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def num_pairs(self) -> float:
        """Count the (query, key) pairs of one head, on all ranks."""
        return self.query_len * (self.cached_len + (self.query_len + 1) / 2)

    def add_recall(self, recall: Tensor | None, num_queries: int, layer_idx: int) -> None:
        """Note the recall of one segment in one layer, where it is measured."""
        if recall is not None and self.recall is not None:
            self.recall.add(recall, num_typical(num_queries), num_queries, layer_idx)

    def runs(self, first: int, count: int) -> Iterator[tuple[slice, int]]:
        """List the runs of consecutive positions among ``count`` of the rows here from row
        ``first`` on: the rows of each, counted from ``first``, and its first position."""
        before = 0
        for start, stop in self.ranges:
            low, high = (max(0, min(row - before, stop - start)) for row in (first, first + count))
            if low < high:
                yield slice(before + low - first, before + high - first), start + low
            before += stop - start

    def local_cuts(self, cuts: Sequence[int]) -> list[int]:
        """Return the cuts of the rows here, counted from the first, for cuts of the whole slice in
        positions: as many pieces."""
        if self.share is None or not self.share.is_split:
            return [cut - self.cached_len for cut in cuts]
        return self.share.local_cuts(len(cuts) - 1)

    @property
    def context_len(self) -> int:
        """Tokens that the slice's last query may attend to."""
        return self.cached_len + self.query_len


class PrefillPart(NamedTuple):
    """Positions start ... stop - 1 of one prefill slice, whose queries attend alike."""

    start: int
    stop: int
    selection: Selection | None
    """None: to everything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeGroup:
    """One new token for each of B requests; they follow the prefill slices in the packed rows."""

    start: int
    block_tables: Tensor
    """[B, max blocks] int64, padded with 0."""
    context_lens: Tensor
    """[B] int64, the new token included."""
    scales: Tensor
    """[B] fp32"""
    share: KeyShare | None = None
    """Which keys this rank attends to, where others attend to the rest; None: to all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMetadata:
    """One step: packed prefill slices, then the decode rows."""

    positions: Tensor
    """[T] int64 true positions; with a ``division`` of the keys in the order of arrival."""
    slot_mapping: Tensor
    """[T] int64: block_id * P + offset, the place of each new token in the KV cache. -1: none."""
    filled_blocks: Tensor
    """[n] int64, KV blocks whose last slot is among them; their tile means are due. -1: none."""
    prefills: tuple[PrefillSlice, ...]
    decode: DecodeGroup | None
    output_rows: Tensor | None = None
    """[n] int64, the packed rows whose hidden states are wanted; None: all T."""
    output: AttentionMetadata | None = None
    """The last layer's view where ``output_rows`` is set: all T tokens are written to the KV cache,
    only the n rows are queries. Nothing after the last layer reads the others."""
    division: Division | None = None
    """How the rows are divided among ranks; None: every rank has all of them."""

    def outputs(self, hidden: Tensor) -> Tensor:
        """Return the wanted rows of [T, M] hidden states, [n, M]."""
        if self.division is not None:
            return self.division.outputs(hidden)
        return hidden if self.output_rows is None else hidden[self.output_rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSlice:
    """Host-side description of one request's part of a step; what `build_metadata` takes."""

    query_len: int
    cached_len: int
    prompt_len: int
    block_ids: Sequence[int]
    """Blocks that cover ``cached_len + query_len`` tokens, in order (more are allowed)."""
    sparse: bool = False
    num_outputs: int | None = None
    """How many of the last tokens need hidden states after the last layer; None: all."""
    may_split: bool = False
    """Ranks may divide its rows; at most one of them is an output."""

    @property
    def is_decode(self) -> bool:
        """A single token beyond the prompt."""
        return self.query_len == 1 and self.cached_len >= self.prompt_len


def build_metadata(
    slices: Sequence[SequenceSlice],
    *,
    block_size: int,
    head_dim: int,
    dca: DcaConfig | None,
    device: torch.device | str,
    sharing: RowSharing | None = None,
) -> AttentionMetadata:
    """Turn lengths and block ids into tensors, sent to the device by one copy without waiting.

    Args:
        slices: prefill slices first, then decodes (asserted).
        dca: gives the YaRN temperature's trained length; None: temperature 1.
        sharing: how ranks divide slices among themselves; None: there is one rank.

    The temperature of a request is that of its longest length so far, ``max(prompt_len,
    context_len)``: every prefill chunk of a prompt shares it (paper section 5, report eq. 1).
    """
    tokens = _tokens(slices, block_size)
    make = partial(
        _metadata, block_size=block_size, head_dim=head_dim, dca=dca, sharing=sharing)
    shares = _shares(slices, sharing)
    if sharing is not None and any(share is not None and share.is_split for share in shares):
        division, order = divide(sharing.group, [
            SharedSlice(share, item.cached_len, item.query_len,
                        item.query_len if item.num_outputs is None else item.num_outputs)
            for item, share in zip(slices, shares, strict=True)])
        rows, narrow = _output_rows(slices)
        return upload(replace(
            make(tokens.ordered(order), slices, shares), output_rows=rows, division=division,
            output=make(tokens, narrow, _shares(narrow, sharing, may_split=False))), device)
    if all(item.num_outputs in (None, item.query_len) for item in slices):
        return upload(make(tokens, slices, shares), device)
    rows, narrow = _output_rows(slices)
    return upload(replace(
        make(tokens, slices, shares), output_rows=rows,
        output=make(tokens, narrow, _shares(narrow, sharing, may_split=False))), device)


def _shares(
    slices: Sequence[SequenceSlice], sharing: RowSharing | None, *, may_split: bool = True,
) -> list[RowShare | None]:
    """Share the prefill slices out."""
    return [_share(item, sharing, may_split=may_split) for item in slices]


def _share(
    item: SequenceSlice, sharing: RowSharing | None, *, may_split: bool = True,
) -> RowShare | None:
    if sharing is None or item.is_decode:
        return None
    return sharing.share(item.cached_len, item.cached_len + item.query_len,
                         may_split=may_split and item.may_split, sparse=item.sparse)


def num_rows(item: SequenceSlice, sharing: RowSharing | None) -> int:
    """Count the packed rows of a slice on this rank, as `build_metadata` shares them out."""
    share = _share(item, sharing)
    return item.query_len if share is None else share.num_rows(share.group.rank)


class _Tokens(NamedTuple):
    """Where the step's tokens go; see `AttentionMetadata`. On the host."""

    positions: Tensor
    slot_mapping: Tensor
    filled_blocks: Tensor

    def ordered(self, order: NDArray[np.int64]) -> _Tokens:
        """Return them as a division orders them; -1 is a row that is not stored."""
        rows = torch.from_numpy(order)
        places = rows.clamp_min(0)
        return self._replace(
            positions=self.positions[places],
            slot_mapping=self.slot_mapping[places].masked_fill(rows < 0, -1))


def _tokens(slices: Sequence[SequenceSlice], block_size: int) -> _Tokens:
    """List all rows at once: a step of many decodes is short, and so must be what is done for it
    here."""
    lens = np.array([item.query_len for item in slices], dtype=np.int64)
    cached = np.array([item.cached_len for item in slices], dtype=np.int64)
    positions = np.arange(lens.sum()) + np.repeat(cached - np.cumsum(lens) + lens, lens)
    blocks, filled = list[NDArray[np.int64]](), list[int]()
    for item in slices:
        context_len = item.cached_len + item.query_len
        first, stop = item.cached_len // block_size, -(-context_len // block_size)
        taken = np.asarray(item.block_ids[first:stop], dtype=np.int64)
        blocks.append(taken)
        filled += taken[:context_len // block_size - first].tolist()
    begin = np.cumsum([0, *map(len, blocks)])[:-1] - cached // block_size
    block = np.concatenate([*blocks, _NO_BLOCKS])[positions // block_size + np.repeat(begin, lens)]
    return _Tokens(
        torch.from_numpy(positions), torch.from_numpy(block * block_size + positions % block_size),
        torch.tensor(filled, dtype=torch.int64))


def _metadata(
    tokens: _Tokens, slices: Sequence[SequenceSlice], shares: Sequence[RowShare | None], *,
    block_size: int, head_dim: int, dca: DcaConfig | None, sharing: RowSharing | None,
) -> AttentionMetadata:
    prefills: list[PrefillSlice] = []
    decodes: list[SequenceSlice] = []
    start = 0
    for item, share in zip(slices, shares, strict=True):
        count = item.query_len
        if item.is_decode:
            decodes.append(item)
        else:
            assert not decodes, "prefill slices come before decodes"
            context_len = item.cached_len + item.query_len
            prefills.append(PrefillSlice(
                start=start, query_len=item.query_len, cached_len=item.cached_len,
                prompt_len=item.prompt_len,
                block_table=torch.from_numpy(_table(item, context_len, block_size)),
                scale=softmax_scale(head_dim, max(context_len, item.prompt_len), dca),
                sparse=item.sparse, recall=RecallMeter() if item.sparse else None, share=share,
            ))
            count = prefills[-1].num_rows
        start += count
    tokens = tokens._replace(slot_mapping=_held(tokens.slot_mapping, sharing, block_size))
    return AttentionMetadata(
        **tokens._asdict(), prefills=tuple(prefills),
        decode=_shared(_decode_group(decodes, start - len(decodes), block_size, head_dim, dca),
                       sharing, block_size))


def _shared(
    group: DecodeGroup | None, sharing: RowSharing | None, block_size: int,
) -> DecodeGroup | None:
    """Share the keys of decodes out, where that is worth it. On the host."""
    if group is None or sharing is None:
        return group
    if int(group.context_lens.sum()) < sharing.least_keys and not sharing.divides_kv:
        return group
    return replace(group, share=share_keys(sharing, group.context_lens, block_size))


def _held(slots: Tensor, sharing: RowSharing | None, block_size: int) -> Tensor:
    """Return this rank's places for slots. [n] int64."""
    if sharing is None or not sharing.divides_kv:
        return slots
    return held_slots(slots, block_size, sharing.group)


def _table(item: SequenceSlice, context_len: int, block_size: int) -> NDArray[np.int64]:
    return np.array(item.block_ids[: -(-context_len // block_size)], dtype=np.int64)


def _output_rows(slices: Sequence[SequenceSlice]) -> tuple[Tensor, list[SequenceSlice]]:
    """Return the packed rows [n] of the wanted outputs, and the slices cut down to them."""
    rows, narrow, stop = list[int](), [], 0
    for item in slices:
        stop += item.query_len
        count = item.query_len if item.num_outputs is None else item.num_outputs
        rows += range(stop - count, stop)
        if count == item.query_len:
            narrow.append(item)
        elif count:
            cached_len = item.cached_len + item.query_len - count
            narrow.append(replace(item, query_len=count, cached_len=cached_len, num_outputs=None))
    return torch.tensor(rows, dtype=torch.int64), narrow


def softmax_scale(head_dim: int, length: int, dca: DcaConfig | None) -> float:
    """Compute m^2 / sqrt(D). The YaRN factor m^2 stands on the query side only, so that cached keys
    do not depend on the request's length."""
    trained = dca.original_max_position_embeddings if dca else 0
    return yarn_temperature(length, trained) ** 2 / math.sqrt(head_dim)


def softmax_scales(lengths: Tensor, head_dim: int, dca: DcaConfig | None) -> Tensor:
    """Return `softmax_scale` of each of [B] lengths, on their device. In fp64, so that the fp32
    result is the host's. [B] int64 to [B] fp32."""
    temperature = torch.ones_like(lengths, dtype=torch.float64)
    if dca is not None and dca.original_max_position_embeddings > 0:
        trained = dca.original_max_position_embeddings
        grown = 0.1 * torch.log(lengths.double() / trained) + 1.0
        temperature = grown.masked_fill(lengths <= trained, 1.0)
    return (temperature**2 / math.sqrt(head_dim)).float()


def decode_metadata(
    block_tables: Tensor, context_lens: Tensor, prompt_lens: Tensor, *, block_size: int,
    head_dim: int, dca: DcaConfig | None, sharing: RowSharing | None = None,
) -> AttentionMetadata:
    """Build what `build_metadata` makes of B decodes, from numbers on the device and without the
    host.

    Args:
        block_tables: [B, max blocks] int64; may go on beyond the lengths.
        context_lens: [B] int64, the new token included; 0: a row that has no key, writes none, and
            fills no block (slot and block -1).
        prompt_lens: [B] int64
        sharing: how ranks divide the keys; None: each rank attends to all of them.
    """
    is_padding = context_lens == 0
    positions = (context_lens - 1).clamp_min(0)
    offsets = positions % block_size
    blocks = block_tables.gather(1, (positions // block_size)[:, None])[:, 0]
    slots = (blocks * block_size + offsets).masked_fill(is_padding, -1)
    return AttentionMetadata(
        positions=positions, prefills=(), slot_mapping=_held(slots, sharing, block_size),
        filled_blocks=blocks.masked_fill(is_padding | (offsets != block_size - 1), -1),
        decode=DecodeGroup(
            start=0, block_tables=block_tables, context_lens=context_lens,
            scales=softmax_scales(torch.maximum(context_lens, prompt_lens), head_dim, dca),
            share=None if sharing is None else share_keys(sharing, context_lens, block_size)))


def _decode_group(
    decodes: Sequence[SequenceSlice], start: int, block_size: int, head_dim: int,
    dca: DcaConfig | None,
) -> DecodeGroup | None:
    if not decodes:
        return None
    lens = [item.cached_len + 1 for item in decodes]
    tables = np.zeros((len(decodes), -(-max(lens) // block_size)), dtype=np.int64)
    for row, item, length in zip(tables, decodes, lens, strict=True):
        num_blocks = -(-length // block_size)
        row[:num_blocks] = item.block_ids[:num_blocks]
    scales = [softmax_scale(head_dim, max(length, item.prompt_len), dca)
              for length, item in zip(lens, decodes, strict=True)]
    return DecodeGroup(
        start=start, block_tables=torch.from_numpy(tables),
        context_lens=torch.tensor(lens, dtype=torch.int64),
        scales=torch.tensor(scales, dtype=torch.float32))
