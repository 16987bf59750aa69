"""What the dense and sparse Triton kernels share: supported shapes, launch options, key splits.

Few query tiles against a long history are split along the keys, and the parts merged by LSE.
"""

from __future__ import annotations

from functools import cache as memoize

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.types import PagedKV, QueryRotary

_MAX_SPLITS, _MIN_SPLIT_TILES = 32, 16
_MERGE_ROWS = 16


def supports(q: Tensor, cache: PagedKV, rotary: QueryRotary, context_len: int) -> bool:
    """Return whether the Triton prefill kernels can serve a call: a pure function of dtype and
    shape.

    q: [T, H, D]. Interpreted (on CPU tensors) they also take fp32.
    """
    head_dim, tile_len = q.shape[2], cache.k.shape[1]
    dtypes = (torch.bfloat16, torch.float16) if q.is_cuda else (torch.bfloat16, torch.float32)
    aligned = rotary.stride % tile_len == 0 or context_len <= rotary.stride
    contiguous = cache.k.is_contiguous() and cache.v.is_contiguous() and q.stride(2) == 1
    return (q.dtype in dtypes and cache.k.dtype == q.dtype == cache.v.dtype and contiguous
            and aligned and head_dim in (16, 32, 64, 128) and tile_len in (16, 32, 64, 128))


def num_splits(num_items: int, num_key_tiles: int, num_sms: int) -> int:
    """Return how many parts the keys of each item (query tile of a head) are cut into.

    The fewest whose time, waves of one program on each multiprocessor over parts, is within 5% of
    the best; parts keep at least 16 key tiles.
    """
    most = max(1, min(_MAX_SPLITS, num_key_tiles // _MIN_SPLIT_TILES))
    times = [-(-num_items * parts // num_sms) / parts for parts in range(1, most + 1)]
    return next(i for i, time in enumerate(times, 1) if time <= 1.05 * min(times))


@memoize
def num_sms(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@memoize
def launch_options(device: torch.device, tile_len: int) -> dict[str, int]:
    """Return how many keys a program takes at once, its warps and pipeline stages.

    Hopper's tensor cores read both operands from shared memory, so a whole key tile of 128 fits the
    registers (160 KiB shared); elsewhere 64 keys do (64 KiB). The interpreter takes few, so that
    its small tiles fall into parts.
    """
    keys = 16
    if device.type == "cuda":
        keys = 128 if torch.cuda.get_device_capability(device)[0] == 9 else 64
    return {"KEYS": min(keys, tile_len), "num_warps": 8 if tile_len == 128 else 4, "num_stages": 2}


def merge_splits(parts: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `longspan.ops.merge_parts`. Parts may lie apart; each is contiguous."""
    splits, num_queries, num_heads, head_dim = parts.shape
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    lse = lses.new_empty(lses.shape[1:])
    num_rows = num_queries * num_heads
    _merge_kernel[(triton.cdiv(num_rows, _MERGE_ROWS),)](
        parts, lses, out, lse, num_rows, splits, parts.stride(0), lses.stride(0),
        ROWS=_MERGE_ROWS, HEAD_DIM=head_dim)
    return out, lse


@triton.jit(do_not_specialize=["num_rows", "splits", "lse_stride"])
def _merge_kernel(
    parts, lses, out, lse, num_rows, splits, part_stride, lse_stride, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Merge ROWS rows (token and head) of all parts, weighed by their LSEs."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    values = row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for part in range(splits):
        source = lses + part * lse_stride.to(tl.int64)
        top = tl.maximum(top, tl.load(source + row, mask=exists, other=0.0))
    base = tl.where(top == float("-inf"), 0.0, top)  # no part has a key
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for part in range(splits):
        source = lses + part * lse_stride.to(tl.int64)
        weight = tl.exp(tl.load(source + row, mask=exists, other=0.0) - base)
        total += weight
        acc += weight[:, None] * tl.load(
            parts + part * part_stride.to(tl.int64) + values, mask=exists[:, None], other=0.0)
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + values, acc.to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(lse + row, base + tl.log(total), mask=exists)
