"""From a scheduled step to device tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.metadata import (
    AttentionMetadata,
    SequenceSlice,
    build_metadata,
    num_rows,
)
from longspan.attention.ranks import RowSharing
from longspan.attention.recall import RecallMeter
from longspan.attention.upload import upload
from longspan.config import DcaConfig
from longspan.engine.request import TokenIds
from longspan.engine.step import ScheduledBatch, ScheduledSlice
from longspan.ops.sampling.sample import SamplingRows


class RequestMeter(NamedTuple):
    """Who takes the recall of one request's slice."""

    request_id: str
    meter: RecallMeter


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBatch:
    """One step on the device; n of its slices sample a token."""

    token_ids: Tensor
    """Ids of the slices that are packed together, [T] int64."""
    metadata: AttentionMetadata
    """Attention metadata of the packed tokens."""
    sampling: SamplingRows
    """Parameters of each sampled row, [n] each."""
    slots: Tensor
    """Slots of the requests that sample, [n] int64."""
    all_greedy: bool
    scored: tuple[ScheduledSlice, ...] = ()
    """The slices that are packed together, if any of them has `ScoredTokens`."""
    meters: tuple[RequestMeter, ...] = ()
    """Recall of the sparse slices that are packed together."""


def build_batch(
    batch: ScheduledBatch, *, block_size: int, head_dim: int, dca: DcaConfig | None,
    device: torch.device | str, last_tokens: Tensor | None = None,
    sharing: RowSharing | None = None,
) -> DeviceBatch:
    """Pack the slices' tokens one after the other and describe them. Never waits for the device.
    Slices in pieces are computed apart; only their sampling is part of the batch.

    Args:
        last_tokens: [num slots] int64 on the device, the token that each slot sampled last: the
            input of slices that run ahead of the host.
        sharing: how ranks divide the rows of prefill slices; None: there is one rank.
    """
    together = [item for item in batch.slices if item.pieces is None]
    metadata = build_metadata(
        [_sequence_slice(item) for item in together], block_size=block_size,
        head_dim=head_dim, dca=dca, device="cpu", sharing=sharing)
    packed, ahead = array("i"), list[tuple[int, int]]()  # (row, slot)
    for index, item in enumerate(together):
        if item.is_run_ahead:
            ahead.append((len(packed), item.slot))
        if index < len(metadata.prefills) and sharing is not None:
            for start, stop in metadata.prefills[index].ranges:
                packed.extend(item.token_ids[start - item.cached_len : stop - item.cached_len])
        else:
            packed.extend(item.token_ids or (0,))
    sampled = [item for item in batch.slices if item.sampling is not None]
    here = DeviceBatch(
        token_ids=_as_tensor(packed), metadata=metadata,
        sampling=_sampling_rows(sampled),
        slots=torch.tensor([item.slot for item in sampled], dtype=torch.int64),
        all_greedy=is_greedy(sampled),
        scored=tuple(together) if any(item.scored for item in together) else (),
        meters=tuple(RequestMeter(item.request_id, part.recall)
                     for item, part in zip(together, metadata.prefills, strict=False)
                     if part.recall is not None))
    there = upload(here, device)
    if ahead:
        assert last_tokens is not None
        rows, slots = upload(torch.tensor(ahead), device).unbind(1)
        there.token_ids[rows] = last_tokens[slots]
    return there


def is_greedy(items: Sequence[ScheduledSlice]) -> bool:
    """Return whether every slice that samples has temperature 0."""
    return all(item.sampling is None or item.sampling.temperature == 0 for item in items)


def _as_tensor(token_ids: TokenIds) -> Tensor:
    if not token_ids:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(token_ids, dtype=torch.int32).to(torch.int64)


def rows_here(item: ScheduledSlice, sharing: RowSharing | None) -> int:
    """Count the rows of a slice that this rank computes."""
    return num_rows(_sequence_slice(item), sharing)


def num_outputs(item: ScheduledSlice) -> int:
    """Count the last rows of a slice that are wanted after the last layer. A scored slice in pieces
    has all of them: sparse attention selects keys for all rows of a chunk together."""
    if item.scored is None:
        return int(item.context_len >= item.prompt_len)
    return item.context_len - item.scored.first + 1


def _sequence_slice(item: ScheduledSlice) -> SequenceSlice:
    return SequenceSlice(
        query_len=item.query_len, cached_len=item.cached_len, prompt_len=item.prompt_len,
        block_ids=item.block_ids, sparse=item.sparse, num_outputs=num_outputs(item),
        may_split=item.scored is None)


def _sampling_rows(items: Sequence[ScheduledSlice]) -> SamplingRows:
    rows = [item.sampling for item in items if item.sampling is not None]
    return SamplingRows(
        temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32),
        top_k=torch.tensor([row.top_k for row in rows], dtype=torch.int64),
        top_p=torch.tensor([row.top_p for row in rows], dtype=torch.float32),
        min_p=torch.tensor([row.min_p for row in rows], dtype=torch.float32),
        seed=torch.tensor([row.seed for row in rows], dtype=torch.int64),
        position=torch.tensor([item.context_len for item in items], dtype=torch.int64))
