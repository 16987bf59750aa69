"""Device functions that the attention kernels share: one key tile in an online softmax.

Scores are base-2 logarithms: queries carry log2(e) (see `rotary`).
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scores_of(q, k) -> tl.tensor:
    """Compute the scores of q [M, D] against keys [N, D]: fp32 [M, N]. fp32 inputs are multiplied
    as fp32."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def add_tile(acc, total, top, scores, v) -> tl.tuple:
    """Take one key tile into the softmax. acc [M, D], total [M], top [M] fp32; scores [M, N], -inf
    drops a key; v [N, D]. Some row without any key so far gives NaN: see `add_sparse_tile`."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.math.exp2(scores - new_top[:, None])
    kept = tl.math.exp2(top - new_top)
    total = total * kept + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def add_sparse_tile(acc, total, top, scores, v) -> tl.tuple:
    """Do `add_tile` for rows that may not have seen any key yet."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.math.exp2(scores - finite[:, None])
    kept = tl.math.exp2(top - finite)
    total = total * kept + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def finish(acc, total, top) -> tl.tuple:
    """Return out [M, D] and natural-log LSE [M]; rows without any key: 0 and -inf."""
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    return out, tl.where(total > 0, (top + tl.math.log2(total)) * LN_2, float("-inf"))
