"""From a scheduled step to device tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.metadata import AttentionMetadata, SequenceSlice, build_metadata
from longspan.config import DcaConfig
from longspan.engine.step import ScheduledBatch, ScheduledSlice
from longspan.ops.sample import SamplingRows


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBatch:
    """One step on the device; n of its slices sample a token."""

    token_ids: Tensor
    """[T] int64"""
    metadata: AttentionMetadata
    sampling: SamplingRows
    """[n] each"""
    all_greedy: bool


def build_batch(
    batch: ScheduledBatch, *, block_size: int, head_dim: int, dca: DcaConfig | None,
    device: torch.device | str,
) -> DeviceBatch:
    """Pack the slices' tokens one after the other and describe them."""
    metadata = build_metadata(
        [_sequence_slice(item) for item in batch.slices], block_size=block_size,
        head_dim=head_dim, dca=dca, device=device)
    packed = array("i")
    for item in batch.slices:
        packed.extend(item.token_ids)
    token_ids = torch.frombuffer(packed, dtype=torch.int32).to(torch.int64)
    sampled = [item for item in batch.slices if item.sampling is not None]
    return DeviceBatch(
        token_ids=token_ids.to(device), metadata=metadata,
        sampling=_sampling_rows(sampled, device),
        all_greedy=all(s.sampling is not None and s.sampling.temperature == 0 for s in sampled))


def _sequence_slice(item: ScheduledSlice) -> SequenceSlice:
    return SequenceSlice(
        query_len=item.query_len, cached_len=item.cached_len, prompt_len=item.prompt_len,
        block_ids=item.block_ids, sparse=item.sparse,
        num_outputs=0 if item.sampling is None else 1)


def _sampling_rows(items: Sequence[ScheduledSlice], device: torch.device | str) -> SamplingRows:
    rows = [item.sampling for item in items if item.sampling is not None]

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    return SamplingRows(
        temperature=column([row.temperature for row in rows], torch.float32),
        top_k=column([row.top_k for row in rows], torch.int64),
        top_p=column([row.top_p for row in rows], torch.float32),
        min_p=column([row.min_p for row in rows], torch.float32),
        seed=column([row.seed for row in rows], torch.int64),
        position=column([item.context_len for item in items], torch.int64))
