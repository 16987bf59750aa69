"""No speed without correctness: ops against the fp32 specification before they are timed.

Each op is first run on a small awkward case (shuffled blocks, memory poisoned with NaN, DCA chunks
of 512 tokens so that all zones occur), and then, on the very input that is timed, some random rows
of its result are computed anew.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan import ops
from longspan.bench.ops.baselines import Plain
from longspan.bench.ops.inputs import BLOCK_SIZE, LayerInput, make_input, make_rotary
from longspan.bench.session import CheckFailed
from longspan.bench.shapes import Shape
from longspan.config import DcaConfig
from longspan.model import TORCH_DTYPES
from longspan.ops import reference
from longspan.ops.select import eager
from longspan.ops.types import Budget, PagedKV, Selection
from longspan.units import default_dtype

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Error ratio, as docs/numerics.md."""
SMALL_DCA = DcaConfig(chunk_size=640, local_size=128)
SMALL_TOKENS = 1453
SMALL_START, SMALL_QUERIES = 1024, 3 * BLOCK_SIZE
"""In the third DCA chunk of the small case: keys of all three zones."""
NUM_ROWS, NUM_HEADS = 4, 2
MAX_RECALL_LOSS = 0.02
"""Attention mass that a selection may lose against the specification's own: close scores may
change places."""


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return the RMS error over the RMS reference; NaN and infinities that differ give infinity."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    infinite = expected.isinf()
    if not torch.equal(actual[infinite], expected[infinite]):
        return float("inf")
    actual, expected = actual[~infinite], expected[~infinite]
    if not actual.isfinite().all():
        return float("inf")
    error = (actual - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt().clamp(min=1e-30))


def require_close(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Return the error ratio. Raises `CheckFailed` above the tolerance of ``dtype``."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    ratio, limit = error_ratio(actual, expected), TOLERANCE[dtype]
    if not ratio <= limit:
        raise CheckFailed(f"{what} is wrong: error ratio {ratio:.2e}, at most {limit:.0e}; "
                          "not timed")
    return ratio


def small_input(shape: Shape, device: str, content: str = "random") -> LayerInput:
    """Make the awkward case of a shape: its heads, few tokens, short DCA chunks."""
    rotary = make_rotary(shape, SMALL_TOKENS, device, SMALL_DCA)
    return make_input(shape, SMALL_TOKENS, content, device, rotary=rotary, shuffled=True)


def check_dense(shape: Shape, device: str) -> float:
    """Prefill of 333 queries that cross a DCA border, and of one. Returns the worst ratio."""
    item = small_input(shape, device)
    ratios = []
    for start, count in ((907, 333), (SMALL_TOKENS - 1, 1), (0, 63)):
        q = item.make_queries(start, count)
        args = (item.cache, item.block_table, start, item.rotary, item.scale)
        ratios += _compare("prefill_attention", ops.prefill_attention(q, *args),
                           reference.prefill_attention(q, *args), q.dtype)
    return max(ratios)


def check_decode(shape: Shape, device: str) -> float:
    """Check decode for requests of 1, 111 and all tokens, each with its own scale. Returns the
    worst ratio."""
    item = small_input(shape, device)
    lens = torch.tensor([1, 111, SMALL_TOKENS], device=device)
    scales = torch.tensor([1.0, 0.9, 1.1], device=device) * item.scale
    q = item.make_queries(SMALL_TOKENS - 3, 3)
    args = (item.cache, item.block_table.expand(3, -1).contiguous(), lens, item.rotary, scales)
    return max(_compare("decode_attention", ops.decode_attention(q, *args),
                        reference.decode_attention(q, *args), q.dtype))


def check_sparse(shape: Shape, device: str, budget: Budget, correction: bool) -> float:
    """Check selection and sparse prefill over all zones, budgets cut to the case's size."""
    item = small_input(shape, device, "scattered")
    budget = budget._replace(
        vertical=tuple(min(100 + 7 * head, value) for head, value in enumerate(budget.vertical)),
        slash=tuple(min(256 + 128 * (head % 3), value) for head, value in enumerate(budget.slash)))
    q = item.make_queries(SMALL_START, SMALL_QUERIES)
    selection = checked_selection(q, item, SMALL_START, budget)
    args = (item.cache, item.block_table, SMALL_START, item.rotary, item.scale)
    actual = ops.sparse_prefill_attention(q, *args, selection, correction)
    expected = reference.sparse_prefill_attention(q, *args, selection, correction)
    ratios = _compare("sparse_prefill_attention", actual[:2], expected[:2], q.dtype)
    if abs(float(actual[2]) - float(expected[2])) > 0.5:
        raise CheckFailed(f"sparse_prefill_attention counts {float(actual[2]):.0f} pairs, "
                          f"{float(expected[2]):.0f} are right; not timed")
    return max(ratios)


def check_pointwise(shape: Shape, device: str) -> float:
    """Check norms, activation and the KV write on 333 rows. Returns the worst ratio."""
    item, model, count = small_input(shape, device), shape.model, 333
    dtype = item.k.dtype
    x, residual = (torch.randn(count, model.hidden_size, device=device, dtype=dtype)
                   for _ in range(2))
    weight = torch.rand(model.hidden_size, device=device, dtype=dtype) + 0.5
    gate_up = torch.randn(count, 2 * model.intermediate_size, device=device, dtype=dtype)
    ratios = [
        require_close("rms_norm", ops.rms_norm(x, weight, model.rms_norm_eps),
                      reference.rms_norm(x, weight, model.rms_norm_eps), dtype),
        require_close("silu_mul", ops.silu_mul(gate_up), reference.silu_mul(gate_up), dtype)]
    sums = [function(x.clone(), residual.clone(), weight, model.rms_norm_eps)
            for function in (ops.add_rms_norm, reference.add_rms_norm)]
    ratios += [require_close("add_rms_norm", one, other, dtype)
               for one, other in zip(*sums, strict=True)]
    positions = torch.arange(900, 900 + count, device=device)
    slots = item.block_table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    filled = item.block_table[900 // BLOCK_SIZE : (900 + count) // BLOCK_SIZE]
    k, v = (torch.randn(count, *item.k.shape[1:], device=device, dtype=dtype) for _ in range(2))
    caches = [PagedKV(*(part.clone() for part in item.cache if part is not None))
              for _ in range(2)]
    for function, cache in zip((ops.store_kv, reference.store_kv), caches, strict=True):
        function(cache, k, v, positions, slots, filled, item.rotary)
    ratios += [require_close("store_kv", one[item.block_table[:9]], other[item.block_table[:9]],
                             dtype)
               for one, other in zip(*caches, strict=True)
               if one is not None and other is not None]
    return max(ratios)


def check_experts(device: str) -> float:
    """Check 1, 13 and 700 tokens through nine experts, some of whom nobody takes. Returns the worst
    ratio."""
    dtype = TORCH_DTYPES[default_dtype(device)]
    gate_up = (torch.randn(9, 2 * 96, 128, device=device) * 128**-0.5).to(dtype)
    down = (torch.randn(9, 128, 96, device=device) * 96**-0.5).to(dtype)
    ratios = []
    for count in (1, 13, 700):
        logits = torch.randn(count, 9, device=device)
        logits[:, 6:] -= 20
        weights, experts = ops.route(logits, 3, True)
        ratios.append(require_close(
            "route", weights, reference.route(logits, 3, True)[0], torch.float32))
        x = torch.randn(count, 128, device=device).to(dtype)
        ours, theirs = torch.zeros_like(x), torch.zeros_like(x)
        ops.add_routed_mlp(ours, x, weights, experts, gate_up, down)
        reference.add_routed_mlp(theirs, x, weights, experts, gate_up, down)
        ratios.append(require_close("experts", ours, theirs, dtype))
    return max(ratios)


def checked_selection(q: Tensor, item: LayerInput, start: int, budget: Budget) -> Selection:
    """Return our selection on the small case, which must be sound and as good as the
    specification's."""
    args = (item.cache, item.block_table, start, item.rotary, item.scale)
    ours = ops.select_vertical_slash(q, *args, budget)
    check_sound(ours, start + q.shape[0], q.shape[1])
    theirs = eager.select_vertical_slash(q, *args, budget)
    _, full = reference.prefill_attention(q, *args)
    recalls = [torch.exp(reference.sparse_prefill_attention(q, *args, chosen, False)[1] - full)
               for chosen in (ours, theirs)]
    lost = float((recalls[1] - recalls[0]).mean(0).max())
    if not lost <= MAX_RECALL_LOSS:
        raise CheckFailed(f"select_vertical_slash loses {lost:.3f} of a head's attention mass "
                          f"against the specification, at most {MAX_RECALL_LOSS}; not timed")
    return ours


def check_sound(selection: Selection, context_len: int, num_heads: int) -> None:
    """Raise `CheckFailed` unless a selection keeps what `Selection` promises."""
    problems = []
    for head in range(num_heads):
        columns, offsets = selection.columns[head], selection.offsets[head]
        found = columns[columns >= 0]
        if not (found[1:] > found[:-1]).all() or (columns[len(found):] >= 0).any():
            problems.append(f"columns of head {head} do not ascend")
        if len(found) and int(found[-1]) >= context_len:
            problems.append(f"columns of head {head} lie behind the context")
        used = offsets[offsets < selection.tile_len]
        if not (used[:-1] - used[1:] >= (selection.tile_len if selection.aligned else 1)).all():
            problems.append(f"windows of head {head} overlap")
        if selection.aligned and ((used % selection.tile_len).any() or int(used[0]) != 0):
            problems.append(f"windows of head {head} are not whole tiles from the diagonal on")
        if selection.tiles is not None and not _lists_are_sound(selection, head):
            problems.append(f"listed tiles of head {head} do not ascend, or are windows or ahead")
    if problems:
        raise CheckFailed(f"select_vertical_slash: {problems[0]}; not timed")


def _lists_are_sound(selection: Selection, head: int) -> bool:
    """Say whether the lists are ascending, padded at the end, before the query tile and no window
    of it."""
    assert selection.tiles is not None
    windows = -selection.offsets[head] // selection.tile_len
    for query_tile, row in enumerate(selection.tiles[head], selection.first_tile):
        found = row[row >= 0]
        if (found[1:] <= found[:-1]).any() or (row[len(found):] >= 0).any() or (
                torch.isin(query_tile - found, windows) | (found > query_tile)).any():
            return False
    return True


def check_rows(
    what: str, result: Sequence[Tensor], q: Tensor, item: LayerInput, start: int,
    selection: Selection | None = None, correction: bool = False,
) -> float:
    """Check random rows and heads of a result against the specification. Returns the worst ratio.

    result: out [T, H, D] and lse [T, H] of queries at start ...; sparse where there is a selection.
    """
    rng = random.Random(f"{what} {start}")
    count, num_heads, _ = q.shape
    rows = sorted({0, count - 1, *(rng.randrange(count) for _ in range(NUM_ROWS))})
    heads = rng.sample(range(num_heads), min(NUM_HEADS, num_heads))
    outs: list[list[Tensor]] = [[], [], [], []]
    for head in heads:
        cache = _one_kv_head(item.cache, head * item.k.shape[1] // num_heads)
        for row in rows:
            args = (q[row : row + 1, head : head + 1], cache, item.block_table, start + row,
                    item.rotary, item.scale)
            if selection is None:
                out, lse = reference.prefill_attention(*args)
            else:
                out, lse, _ = reference.sparse_prefill_attention(
                    *args, _seen_by(selection, head, start + row), correction)
            for found, tensor in zip(outs, (result[0][row, head], out[0, 0], result[1][row, head],
                                            lse[0, 0]), strict=True):
                found.append(tensor)
    actual, expected, actual_lse, expected_lse = (torch.stack(found) for found in outs)
    return max(require_close(f"{what} (rows of the timed input)", actual, expected, q.dtype),
               require_close(f"{what} (LSE of the timed input)", actual_lse, expected_lse, q.dtype))


def check_decode_rows(
    result: Sequence[Tensor], q: Tensor, item: LayerInput, context_len: int
) -> float:
    """Check a request's decoded token against the specification; q: [1, H, D]."""
    return check_rows("decode_attention", result, q, item, context_len - 1)


def check_plain(name: str, outs: Sequence[Tensor], plain: Plain) -> float:
    """Check a few rows of a baseline's square causal result against an fp32 softmax."""
    rng = random.Random(name)
    q, k, v = plain.q[0], plain.k[0], plain.v[0]
    group = q.shape[0] // k.shape[0]
    actual, expected = [], []
    for _ in range(NUM_ROWS):
        head, row = rng.randrange(q.shape[0]), rng.randrange(q.shape[1])
        stop = plain.history + row + 1
        scores = k[head // group, :stop].float() @ q[head, row].float() * q.shape[-1] ** -0.5
        expected.append(torch.softmax(scores, 0) @ v[head // group, :stop].float())
        actual.append(outs[0][0, head, row])
    return require_close(name, torch.stack(actual), torch.stack(expected), plain.q.dtype)


def _compare(
    what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> list[float]:
    return [require_close(f"{what} {part}", one, other, dtype)
            for part, one, other in zip(("out", "lse"), actual, expected, strict=True)]


def _seen_by(selection: Selection, head: int, position: int) -> Selection:
    """Select what one query of one head attends to."""
    assert selection.aligned, "other selections are checked on the small case"
    own = slice(head, head + 1)
    columns, tiles = selection.columns[own], selection.tiles
    return selection._replace(columns=columns.masked_fill(columns > position, -1),
                              offsets=selection.offsets[own],
                              tiles=None if tiles is None else tiles[own])


def _one_kv_head(cache: PagedKV, kv_head: int) -> PagedKV:
    """Return views of one head's part."""
    part = slice(kv_head, kv_head + 1)
    assert cache.k_mean is not None and cache.v_mean is not None
    return PagedKV(cache.k[:, :, part], cache.v[:, :, part], cache.k_mean[:, part],
                   cache.v_mean[:, part])
