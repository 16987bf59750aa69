"""Where each query of one step stands: device tensors and host integers, built from lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.rope import yarn_temperature
from longspan.config import DcaConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillSlice:
    """Consecutive prompt tokens of one request computed in this step."""

    start: int
    """First row of the slice in the step's packed tokens."""
    query_len: int
    cached_len: int
    """Tokens of this request already in the KV cache: the slice's first position."""
    prompt_len: int
    """Whole prompt, tokens; the dense tail is counted from its end."""
    block_table: Tensor
    """[ceil(context_len / P)] int64, KV block ids in order."""
    scale: float
    """Softmax scale, with the YaRN attention temperature in it."""
    sparse: bool

    @property
    def context_len(self) -> int:
        """Tokens that the slice's last query may attend to."""
        return self.cached_len + self.query_len


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


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMetadata:
    """One step: packed prefill slices, then the decode rows."""

    positions: Tensor
    """[T] int64 true positions."""
    slot_mapping: Tensor
    """[T] int64: block_id * P + offset, the place of each new token in the KV cache."""
    prefills: tuple[PrefillSlice, ...]
    decode: DecodeGroup | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSlice:
    """Host-side description of one request's part of a step; what `build_metadata` takes."""

    query_len: int
    cached_len: int
    prompt_len: int
    block_ids: Sequence[int]
    """Blocks that cover ``cached_len + query_len`` tokens, in order (more are allowed)."""
    sparse: bool = False

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
) -> AttentionMetadata:
    """Turn lengths and block ids into tensors.

    Args:
        slices: prefill slices first, then decodes (asserted).
        dca: gives the YaRN temperature's trained length; None: temperature 1.

    The temperature of a request is that of its longest length so far, ``max(prompt_len,
    context_len)``: every prefill chunk of a prompt shares it (paper section 5, report eq. 1).
    """
    prefills: list[PrefillSlice] = []
    decodes: list[SequenceSlice] = []
    positions, slots, start = [], [], 0
    for item in slices:
        context_len = item.cached_len + item.query_len
        table = torch.tensor(item.block_ids[: -(-context_len // block_size)], dtype=torch.int64)
        row = torch.arange(item.cached_len, context_len)
        positions.append(row)
        slots.append(table[row // block_size] * block_size + row % block_size)
        if item.is_decode:
            decodes.append(item)
        else:
            assert not decodes, "prefill slices come before decodes"
            prefills.append(PrefillSlice(
                start=start, query_len=item.query_len, cached_len=item.cached_len,
                prompt_len=item.prompt_len, block_table=table.to(device),
                scale=softmax_scale(head_dim, max(context_len, item.prompt_len), dca),
                sparse=item.sparse,
            ))
        start += item.query_len
    return AttentionMetadata(
        positions=torch.cat(positions).to(device),
        slot_mapping=torch.cat(slots).to(device),
        prefills=tuple(prefills),
        decode=_decode_group(decodes, start - len(decodes), block_size, head_dim, dca, device),
    )


def softmax_scale(head_dim: int, length: int, dca: DcaConfig | None) -> float:
    """m^2 / sqrt(D): the YaRN factor stands on the query side only, so cached keys stay free of
    the request's length (DESIGN decision 2)."""
    trained = dca.original_max_position_embeddings if dca else 0
    return yarn_temperature(length, trained) ** 2 / math.sqrt(head_dim)


def _decode_group(
    decodes: Sequence[SequenceSlice], start: int, block_size: int, head_dim: int,
    dca: DcaConfig | None, device: torch.device | str,
) -> DecodeGroup | None:
    if not decodes:
        return None
    lens = [item.cached_len + 1 for item in decodes]
    tables = torch.zeros(len(decodes), -(-max(lens) // block_size), dtype=torch.int64)
    for row, (item, length) in enumerate(zip(decodes, lens, strict=True)):
        num_blocks = -(-length // block_size)
        tables[row, :num_blocks] = torch.tensor(item.block_ids[:num_blocks], dtype=torch.int64)
    scales = [softmax_scale(head_dim, max(n, item.prompt_len), dca)
              for n, item in zip(lens, decodes, strict=True)]
    return DecodeGroup(
        start=start, block_tables=tables.to(device),
        context_lens=torch.tensor(lens, dtype=torch.int64).to(device),
        scales=torch.tensor(scales, dtype=torch.float32).to(device),
    )
