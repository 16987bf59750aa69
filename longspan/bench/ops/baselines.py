"""What our attention is compared with: PyTorch's own fused kernels, on ordered keys and values.

They know neither pages nor Dual Chunk Attention: they get plain contiguous tensors, which is the
best case for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.bench.session import Unavailable

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION,
            "math": SDPBackend.MATH}
"""math: for CPUs and tests."""
FLEX = "flex"
FLEX_BLOCK = 128


class Plain(NamedTuple):
    """Ordered inputs of one request."""

    q: Tensor
    """[1, H, T, D]"""
    k: Tensor
    """[1, K, S, D]; the queries are the last T of the S positions."""
    v: Tensor
    """[1, K, S, D]"""

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Plain:
        """Copy q: [T, H, D] and k, v: [S, K, D] to contiguous tensors."""
        return cls(*(x.transpose(0, 1)[None].contiguous() for x in (q, k, v)))

    @property
    def history(self) -> int:
        """Keys before the first query."""
        return self.k.shape[2] - self.q.shape[2]


Attend = Callable[[], list[Tensor]]
"""Runs once; gives the outputs of its calls, each [1, H, T, D]."""


def prepare(name: str, plain: Plain) -> Attend:
    """Prepare causal attention by a baseline, called once to see that it works.

    Square inputs are one causal call. With a history SDPA takes two calls, all queries over all of
    the history without a mask and causal over their own keys, which are not merged; FlexAttention
    takes one. Raises `Unavailable`.
    """
    if name != FLEX and name not in BACKENDS:
        raise Unavailable(f"no baseline is called {name!r}")
    if name != "math" and plain.q.device.type != "cuda":
        raise Unavailable(f"{name} needs a CUDA GPU")
    if name == FLEX:
        return _flex(plain)
    return _sdpa(BACKENDS[name], plain)


def prepare_decode(name: str, plain: Plain) -> Attend:
    """Prepare one query over all keys by an SDPA backend. Raises `Unavailable`."""
    if name == FLEX:
        raise Unavailable("flex is not measured for one query")
    return prepare(name, plain)


def _sdpa(backend: SDPBackend, plain: Plain) -> Attend:
    history = plain.history
    calls: list[tuple[Tensor, Tensor, bool]] = []
    if plain.q.shape[2] == 1:
        calls.append((plain.k, plain.v, False))
    else:
        if history:
            calls.append((plain.k[:, :, :history], plain.v[:, :, :history], False))
        calls.append((plain.k[:, :, history:], plain.v[:, :, history:], True))

    def attend(*, repeat: bool) -> list[Tensor]:
        with sdpa_kernel(backend):
            return [_call(plain.q, k, v, is_causal, repeat) for k, v, is_causal in calls]

    try:
        attend(repeat=False)
    except RuntimeError:  # a backend without GQA: it then reads keys and values repeated
        group = plain.q.shape[1] // plain.k.shape[1]
        calls = [(k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal)
                 for k, v, is_causal in calls]
        attend(repeat=True)
        return lambda: attend(repeat=True)
    return lambda: attend(repeat=False)


def _call(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, repeat: bool) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, enable_gqa=not repeat and q.shape[1] != k.shape[1])


def _flex(plain: Plain) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    if plain.history % FLEX_BLOCK or plain.q.shape[2] % FLEX_BLOCK:
        raise Unavailable(f"flex is measured on multiples of {FLEX_BLOCK} tokens")
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    mask = causal_blocks(plain.q.shape[2], plain.history, plain.q.device)

    def attend() -> list[Tensor]:
        return [compiled(plain.q, plain.k, plain.v, block_mask=mask, enable_gqa=True)]

    attend()
    return attend


def causal_blocks(num_queries: int, history: int, device: torch.device) -> Any:
    """Return FlexAttention's block mask of causal queries behind a history, in whole blocks: full
    blocks before the diagonal one, which alone is masked element by element."""
    from torch.nn.attention.flex_attention import BlockMask

    rows = torch.arange(num_queries // FLEX_BLOCK, device=device) + history // FLEX_BLOCK
    num_columns = (num_queries + history) // FLEX_BLOCK
    diagonal = rows.new_zeros(len(rows), num_columns)
    diagonal[:, 0] = rows
    full = torch.arange(num_columns, device=device).expand(len(rows), -1)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + history >= key

    counts, indices, full_counts, full_indices = (
        part.to(torch.int32)[None, None].contiguous()
        for part in (torch.ones_like(rows), diagonal, rows, full))
    return BlockMask.from_kv_blocks(
        counts, indices, full_counts, full_indices, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask)
