"""Pure tensor functions. `reference` is the specification; what is exported here is the fastest
path that fits device, dtype and shape, with the same signatures and results.

On CUDA: Gluon kernels on Hopper (`hopper.py` in each folder), Triton kernels from Ampere on
(`triton.py`, `decode`, `pointwise`). Everywhere else, and for shapes that no kernel takes, PyTorch
programs over its fused attention (`eager.py`).
Kernels are imported when the first CUDA tensor arrives: Triton need not be there before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from longspan.ops import int8_kv, reference
from longspan.ops.dense import eager as eager_dense
from longspan.ops.moe import eager as eager_moe
from longspan.ops.quant import eager as eager_quant
from longspan.ops.quant.eager import pack_int4, quantize_blocks, quantize_int4, quantize_rows
from longspan.ops.reference import rotate
from longspan.ops.select import eager as select
from longspan.ops.select import online, recall, scouts
from longspan.ops.sparse import eager as eager_sparse
from longspan.ops.tiles import few_calls
from longspan.ops.tiles.attend import merge, ordered_kv, widened_kv
from longspan.ops.types import (
    Budget,
    Fp8Rows,
    Fp8Weights,
    Int4Weights,
    KeySpans,
    Matrices,
    PagedKV,
    QueryRotary,
    Selection,
)

__all__ = [
    "Fp8Rows",
    "PagedKV",
    "QueryRotary",
    "Selection",
    "activation_group",
    "add_rms_norm",
    "add_routed_mlp",
    "decode_attention",
    "fp8_linear",
    "int4_linear",
    "measure_recall",
    "merge_parts",
    "pack_int4",
    "prefill_attention",
    "quantize_blocks",
    "quantize_int4",
    "quantize_rows",
    "readable_kv",
    "rms_norm",
    "rms_norm_fp8",
    "rotate",
    "route",
    "select_vertical_slash",
    "silu_mul",
    "silu_mul_fp8",
    "sparse_prefill_attention",
    "store_kv",
]

FEW_ROWS = 16
"""Up to so many rows quantised weights are read once and activations stay as they are."""
GROUPED_ROUTES = 16_384
"""From so many rows of experts on grouped products are taken: Hopper's, or else PyTorch's."""


def prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.prefill_attention`."""
    args = (q, cache, block_table, cached_len, rotary, scale)
    if q.is_cuda:
        from longspan.ops import decode
        from longspan.ops.dense import hopper, hopper_rows
        from longspan.ops.dense import triton as prefill
        from longspan.ops.tiles import hopper as hopper_tile
        from longspan.ops.tiles import splits

        context_len = cached_len + q.shape[0]
        if hopper_rows.takes_rows(q, cache, rotary, context_len):
            return hopper_rows.prefill_attention(*args)
        if decode.takes_rows(q, cache, rotary):
            return decode.prefill_attention(*args)
        if hopper_tile.supports(q, cache, rotary, context_len):
            return hopper.prefill_attention(*args)
        if splits.supports(q, cache, rotary, context_len):
            return prefill.prefill_attention(*args)
    return eager_dense.prefill_attention(*args)


def sparse_prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, selection: Selection, correction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.sparse_prefill_attention`."""
    args = (q, cache, block_table, cached_len, rotary, scale, selection, correction)
    if q.is_cuda:
        from longspan.ops.sparse import hopper as hopper_sparse
        from longspan.ops.sparse import triton as vertical_slash
        from longspan.ops.tiles import hopper as hopper_tile
        from longspan.ops.tiles import splits

        context_len = cached_len + q.shape[0]
        whole_tiles = cached_len % cache.k.shape[1] == 0 == q.shape[0] % cache.k.shape[1]
        if (selection.aligned and whole_tiles
                and hopper_tile.supports(q, cache, rotary, context_len)):
            return hopper_sparse.sparse_prefill_attention(*args)
        if splits.supports(q, cache, rotary, context_len):
            return vertical_slash.sparse_prefill_attention(*args)
    return eager_sparse.sparse_prefill_attention(*args)


def select_vertical_slash(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, budget: Budget,
) -> Selection:
    """See `select.select_vertical_slash`; with a recall to reach, `online.select_to_recall`."""
    args = (q, cache, block_table, cached_len, rotary, scale)
    if not budget.recall:
        return _select(*args, budget)
    found = online.select_to_recall(
        lambda budgets: _select_several(*args, budgets),
        lambda selection: measure_recall(*args, selection), budget)
    return _add_scouts(found, *args, budget) if budget.num_scouts else found


def _select(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, budget: Budget,
) -> Selection:
    args = (q, cache, block_table, cached_len, rotary, scale, budget)
    if q.is_cuda:
        from longspan.ops.select import triton as sparse_index

        if sparse_index.supports(q, cache, rotary, cached_len, budget):
            return sparse_index.select_vertical_slash(*args)
    return select.select_vertical_slash(*args)


def _select_several(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, budgets: Sequence[Budget],
) -> list[Selection]:
    args = (q, cache, block_table, cached_len, rotary, scale, budgets)
    if q.is_cuda:
        from longspan.ops.select import triton as sparse_index

        if sparse_index.supports(q, cache, rotary, cached_len, budgets[0]):
            return sparse_index.select_several(*args)
    return select.select_several(*args)


def _add_scouts(
    selection: Selection, q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int,
    rotary: QueryRotary, scale: float, budget: Budget,
) -> Selection:
    if q.is_cuda:
        from longspan.ops.select import triton as sparse_index
        from longspan.ops.select import triton_scouts
        from longspan.ops.tiles.splits import num_sms

        if sparse_index.supports(q, cache, rotary, cached_len, budget):
            return triton_scouts.add_scouts(selection, q, cache, block_table, cached_len, rotary,
                                            scale, budget, num_sms(q.device))
    keys, _ = ordered_kv(cache, block_table, cached_len + q.shape[0])
    return scouts.add_scouts(selection, q, keys, cached_len, rotary, scale, budget)


def measure_recall(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, selection: Selection,
) -> Tensor:
    """See `recall.measure_recall`."""
    args = (q, cache, block_table, cached_len, rotary, scale, selection)
    if q.is_cuda:
        from longspan.ops.select import triton as sparse_index
        from longspan.ops.select import triton_recall
        from longspan.ops.tiles.splits import num_sms

        if sparse_index.supports_shapes(q, cache, rotary, cached_len):
            return triton_recall.measure_recall(*args, num_sms(q.device))
    return recall.measure_recall(*args)


def decode_attention(
    q: Tensor, cache: PagedKV, block_tables: Tensor, context_lens: Tensor, rotary: QueryRotary,
    scales: Tensor, spans: KeySpans | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.decode_attention`."""
    args = (q, cache, block_tables, context_lens, rotary, scales, spans)
    if q.is_cuda:
        from longspan.ops import decode

        if decode.supports(cache, q.shape[1]):
            return decode.decode_attention(*args)
    return eager_dense.decode_attention(*args)


def merge_parts(parts: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge what P parts of the keys gave. parts: [P, T, H, D] fp32, 0 where one has no key; lses:
    [P, T, H] fp32, -inf there. Returns out [T, H, D] in ``dtype`` and lse [T, H]."""
    if parts.is_cuda:
        from longspan.ops.tiles import splits

        return splits.merge_splits(parts, lses, dtype)
    out, lse = merge(list(zip(parts, lses, strict=True)))
    return out.to(dtype), lse


def store_kv(
    cache: PagedKV, k: Tensor, v: Tensor, positions: Tensor, slot_mapping: Tensor,
    filled_blocks: Tensor, rotary: QueryRotary,
) -> None:
    """See `reference.store_kv`."""
    args = (cache, k, v, positions, slot_mapping, filled_blocks, rotary)
    if k.is_cuda:
        from longspan.ops import pointwise
        from longspan.ops.quant import triton_kv

        if pointwise.supports_store(cache):
            return (pointwise if cache.k_scale is None else triton_kv).store_kv(*args)
    elif (k.device.type == "cpu" and cache.k_scale is None and slot_mapping.numel()
          and slot_mapping.numpy().min() >= 0):
        return few_calls.store_kv(*args)
    return reference.store_kv(*args)


def readable_kv(
    q: Tensor, cache: PagedKV, block_table: Tensor, context_len: int, rotary: QueryRotary,
) -> tuple[PagedKV, Tensor]:
    """Return a cache and block table that any op reads for these queries of one request: keys and
    values in fewer bits are written out (`int8_kv.dense_kv`, `widened_kv`), unless they are read as
    they are."""
    if cache.k_scale is None:
        if cache.k.dtype == q.dtype:
            return cache, block_table
        return widened_kv(cache, block_table, context_len, q.dtype)
    if q.is_cuda:
        from longspan.ops import decode, pointwise
        from longspan.ops.quant import triton_kv

        if decode.takes_rows(q, cache, rotary):
            return cache, block_table
        if pointwise.supports_store(cache):
            return triton_kv.dense_kv(cache, block_table, context_len)
    return int8_kv.dense_kv(cache, block_table, context_len)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if x.is_cuda:
        from longspan.ops import pointwise

        return pointwise.rms_norm(x, weight, eps)
    return few_calls.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    if x.is_cuda:
        from longspan.ops import pointwise

        return pointwise.add_rms_norm(x, residual, weight, eps)
    return few_calls.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    if gate_up.is_cuda:
        from longspan.ops import pointwise

        return pointwise.silu_mul(gate_up)
    return reference.silu_mul(gate_up) if gate_up.requires_grad else few_calls.silu_mul(gate_up)


def activation_group(weights: Fp8Weights, x: Tensor) -> int | None:
    """Return how activations x [..., K] are best rounded for these weights: numbers of a row that
    share a scale, 0 for all of them; None: they stay as they are."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or x.numel() <= FEW_ROWS * x.shape[-1]:
        return None
    from longspan.ops.quant import scaled

    return scaled.activation_group(weights)


def fp8_linear(
    x: Tensor | Fp8Rows, weights: Fp8Weights, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `eager_quant.fp8_linear`; x may be rounded already, as `activation_group` says. Returns
    ``dtype``. A product with weights like PyTorch's own: modes see it."""
    if has_torch_function((weights.values,)):
        found: Tensor = handle_torch_function(
            fp8_linear, (weights.values,), x, weights, bias, dtype)
        return found
    if isinstance(x, Fp8Rows):
        from longspan.ops.quant import scaled

        return scaled.linear(x, weights, bias, dtype)
    if not x.is_cuda or dtype != torch.bfloat16:
        return eager_quant.fp8_linear(x, weights, bias)
    from longspan.ops.quant import scaled, triton_dense, triton_few, triton_rows

    rows = x.reshape(-1, x.shape[-1])
    group = scaled.activation_group(weights)
    if len(rows) <= triton_few.MAX_ROWS and triton_few.supports_fp8(x.device):
        out = triton_few.fp8_linear(rows, weights, bias)
    elif group is not None:
        out = scaled.linear(triton_rows.quantize(rows, group), weights, bias, dtype)
    elif triton_few.supports_fp8(x.device):
        out = F.linear(rows, triton_dense.dequantize(weights, dtype), bias)
    else:
        out = eager_quant.fp8_linear(rows, weights, bias)
    return out.unflatten(0, x.shape[:-1])


def int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None) -> Tensor:
    """See `eager_quant.int4_linear`. A product with weights like PyTorch's own: modes see it."""
    if has_torch_function((x, weights.packed)):
        seen = (x, weights.packed)
        found: Tensor = handle_torch_function(int4_linear, seen, x, weights, bias)
        return found
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return eager_quant.int4_linear(x, weights, bias)
    from longspan.ops.quant import triton_dense, triton_few

    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= triton_few.INT4_ROWS:
        out = triton_few.int4_linear(rows, weights, bias)
    else:
        out = F.linear(rows, triton_dense.dequantize(weights, x.dtype), bias)
    return out.unflatten(0, x.shape[:-1])


def rms_norm_fp8(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: int
) -> Fp8Rows:
    """`rms_norm`, or `add_rms_norm` where there is a residual, rounded as `activation_group`
    says."""
    if x.is_cuda:
        from longspan.ops.quant import triton_rows

        return triton_rows.rms_norm(x, residual, weight, eps, group)
    normed = reference.rms_norm(x, weight, eps) if residual is None else (
        reference.add_rms_norm(x, residual, weight, eps)[0])
    return eager_quant.quantize_activations(normed, group)


def silu_mul_fp8(gate_up: Tensor, group: int) -> Fp8Rows:
    """`silu_mul`, rounded as `activation_group` says."""
    if gate_up.is_cuda:
        from longspan.ops.quant import triton_rows

        return triton_rows.silu_mul(gate_up, group)
    return eager_quant.quantize_activations(reference.silu_mul(gate_up), group)


def route(logits: Tensor, num_chosen: int, is_normed: bool) -> tuple[Tensor, Tensor]:
    """See `reference.route`; experts may be int32."""
    if logits.is_cuda:
        from longspan.ops.moe import triton_routing

        if logits.shape[1] <= triton_routing.MAX_EXPERTS:
            return triton_routing.route(logits, num_chosen, is_normed)
    return reference.route(logits, num_chosen, is_normed)


def add_routed_mlp(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Matrices,
    down: Matrices,
) -> None:
    """See `reference.add_routed_mlp`. A product with weights like PyTorch's own: modes see it.

    Quantised experts are dequantised where there is no kernel for them.
    """
    args = (sums, x, weights, experts, gate_up, down)
    if has_torch_function(args):
        handle_torch_function(add_routed_mlp, args, *args)
        return
    if x.is_cuda:
        return _add_routed_cuda(sums, x, weights, experts, gate_up, down)
    return eager_moe.add_routed_mlp(*args)


def _add_routed_cuda(
    sums: Tensor, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Matrices, down: Matrices,
) -> None:
    from longspan.ops.moe import grouped, grouped_fp8, hopper
    from longspan.ops.moe import triton as kernels
    from longspan.ops.quant import triton_dense

    args = (sums, x, weights, experts)
    is_many = experts.numel() >= GROUPED_ROUTES
    if isinstance(gate_up, Fp8Weights) and isinstance(down, Fp8Weights):
        if is_many and hopper.supports(x, gate_up, down):
            return hopper.add_routed_mlp(*args, gate_up, down)
        if is_many and grouped_fp8.supports(x, gate_up, down):
            return grouped_fp8.add_routed_mlp(*args, gate_up, down)
        if not is_many and kernels.supports(x, gate_up):
            return kernels.add_routed_mlp(*args, gate_up, down)
    plain = [part if isinstance(part, Tensor) else triton_dense.dequantize(part, x.dtype)
             for part in (gate_up, down)]
    if is_many and hopper.supports(x, *plain):
        return hopper.add_routed_mlp(*args, *plain)
    if is_many and grouped.supports(x, *plain):
        return grouped.add_routed_mlp(*args, *plain)
    if kernels.supports(x, plain[0]):
        return kernels.add_routed_mlp(*args, *plain)
    return eager_moe.add_routed_mlp(*args, *plain)
