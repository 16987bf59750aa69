"""The sections of `longspan bench ops` that need no selection: dense prefill, decode, pointwise,
ceilings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan import ops
from longspan.bench.ops import checks
from longspan.bench.ops.baselines import FLEX, Plain, prepare, prepare_decode
from longspan.bench.ops.inputs import BLOCK_SIZE, CONTENTS, LayerInput, make_input
from longspan.bench.ops.tiles import causal_flops
from longspan.bench.session import BenchSession, CheckFailed
from longspan.bench.shapes import Shape
from longspan.bench.timing import Repeats, Timing, measure, rate, rounded
from longspan.errors import LongspanError
from longspan.model import TORCH_DTYPES
from longspan.units import GIB, default_dtype

SECTIONS = ("ceilings", "chunk", "sparse", "decode", "positions", "whole", "dense", "contents",
            "pointwise", "experts", "linear")
"""In the order they run: what matters most comes first, should time run out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpsOptions:
    """What was asked for on the command line."""

    lengths: tuple[int, ...]
    """Context lengths, tokens."""
    square: tuple[int, ...]
    """Lengths of prompts whose whole dense attention is one call, tokens."""
    baselines: tuple[str, ...]
    """Beside whole prompts and decode."""
    chunk_baselines: tuple[str, ...]
    """Beside prefill chunks behind long histories, where each run takes up to a second."""
    flex_max: int
    """Longest square length that FlexAttention is compiled for, tokens."""
    chunk_len: int
    """Queries of one prefill chunk."""
    layers: int
    """Layers, evenly spaced, whose budgets the whole prefill is measured with."""
    sections: tuple[str, ...]
    contents: tuple[str, ...]
    repeats: Repeats
    gemm_size: int | None = None
    """Rows of the square matrices; default by device."""
    copy_bytes: int | None = None
    expert_tokens: tuple[int, ...] = (32_768, 8_192)
    """Tokens of a prefill through a layer of experts."""
    expert_batches: tuple[int, ...] = (1, 8, 64)
    """Tokens of a decode step through it."""
    linear_rows: tuple[int, ...] = (8_192, 32_768)
    """Rows of a product with weights in prefill."""
    few_rows: tuple[int, ...] = (1, 16)
    """Rows of one in decode."""

    def __post_init__(self) -> None:
        for name, values, known in (("--only", self.sections, SECTIONS),
                                    ("--contents", self.contents, CONTENTS)):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise LongspanError(f"{name}: {unknown[0]!r} is not one of {', '.join(known)}")
        if min(self.lengths) < self.chunk_len or self.chunk_len % BLOCK_SIZE:
            raise LongspanError(
                f"--chunk-len {self.chunk_len} must be a multiple of {BLOCK_SIZE} and at most the "
                f"shortest of --lengths, {min(self.lengths)}")


class LayerBench:
    """Measurements that need no selection, and what all sections share."""

    def __init__(self, session: BenchSession, shape: Shape, options: OpsOptions) -> None:
        self.session, self.shape, self.options = session, shape, options
        self.device, self.model = session.device, shape.model
        self.curves: dict[str, dict[int, float]] = {}
        """The time of one prefill chunk by its history, ms, for each dense implementation."""
        self._verdicts: dict[str, Exception | float] = {}
        self._inputs: dict[str, LayerInput] = {}

    def input(self, content: str = "random", num_tokens: int = 0) -> LayerInput:
        """Make a request of the longest length at least; shorter ones are its beginning. One is
        kept."""
        found = self._inputs.get(content)
        if found is None or found.num_tokens < num_tokens:
            del found
            self._inputs.clear()
            num_tokens = max(num_tokens, *self.options.lengths)
            found = self._inputs[content] = make_input(
                self.shape, num_tokens, content, self.device)
        return found

    def require(self, name: str, check: Callable[[], float]) -> float:
        """Return the error ratio of a check that is made once. Raises `CheckFailed` every time."""
        if name not in self._verdicts:
            try:
                self._verdicts[name] = check()
            except CheckFailed as error:
                self._verdicts[name] = error
        verdict = self._verdicts[name]
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def require_dense(self) -> float:
        """Return the error ratio of dense prefill on the small case."""
        return self.require("dense", lambda: checks.check_dense(self.shape, self.device))

    def params(self, **values: Any) -> dict[str, Any]:
        """Return a row's parameters: the shape and what varies."""
        return {"shape": self.shape.name, **values}

    def measure(self, work: Callable[[], object], *, flush_cache: bool = False) -> Timing:
        """Time with the asked repeats."""
        return measure(work, self.device, self.options.repeats, flush_cache=flush_cache)

    # -- ceilings ------------------------------------------------------------------------------

    def ceilings(self) -> None:
        """Measure what copies and matrix products reach here."""
        is_cuda = self.device.startswith("cuda")
        size = self.options.gemm_size or (8192 if is_cuda else 512)
        num_bytes = self.options.copy_bytes or (GIB if is_cuda else GIB // 64)
        self.session.attempt(
            {"op": "copy", "impl": "torch", "params": {"bytes": num_bytes}},
            lambda: copy_row(self.device, num_bytes, self.options.repeats))

        def gemm() -> dict[str, Any]:
            a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
            timing = self.measure(lambda: a @ b)
            return {**timing.fields(), "tflops": rate(2.0 * size**3, timing)}
        self.session.attempt(
            {"op": "gemm", "impl": "torch", "params": {"m": size, "n": size, "k": size}}, gemm)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in here."""
        return TORCH_DTYPES[default_dtype(self.device)]

    # -- dense prefill -------------------------------------------------------------------------

    def squares(self) -> None:
        """Measure whole prompts in one causal call."""
        for length in self.options.square:
            self._dense("dense_causal", 0, length)

    def chunks(self) -> None:
        """Measure the last prefill chunk of each length, and the first one of all."""
        chunk = self.options.chunk_len
        for length in sorted({chunk, *self.options.lengths}, reverse=True):
            self._dense("dense_chunk", length - chunk, chunk)

    def _dense(self, op: str, start: int, count: int) -> None:
        params = self.params(num_queries=count, context_len=start + count)
        row = self.session.attempt(
            {"op": op, "impl": "ours", "params": params}, partial(self._ours, start, count))
        self._remember("ours", op, start, row)
        is_square = op == "dense_causal"
        for name in self.options.baselines if is_square else self.options.chunk_baselines:
            if name == FLEX and (not is_square or count > self.options.flex_max):
                continue
            row = self.session.attempt(
                {"op": op, "impl": name, "params": params},
                partial(self._baseline, name, start, count), ours=False)
            self._remember(name, op, start, row)

    def _remember(self, name: str, op: str, start: int, row: Mapping[str, Any] | None) -> None:
        if row is not None and op == "dense_chunk":
            self.curves.setdefault(name, {})[start] = row["time_ms"]

    def _ours(self, start: int, count: int) -> dict[str, Any]:
        small = self.require_dense()
        item = self.input(num_tokens=start + count)
        q = item.make_queries(start, count)

        def work() -> tuple[Tensor, Tensor]:
            return ops.prefill_attention(
                q, item.cache, item.block_table, start, item.rotary, item.scale)
        error = checks.check_rows("prefill_attention", work(), q, item, start)
        return self._dense_row(self.measure(work), start, count, max(error, small))

    def _baseline(self, name: str, start: int, count: int) -> dict[str, Any]:
        item = self.input(num_tokens=start + count)
        stop = start + count
        plain = Plain.of(item.make_queries(start, count), item.k[:stop], item.v[:stop])
        attend = prepare(name, plain)
        error = checks.check_plain(name, attend(), plain) if not start else None
        row = self._dense_row(self.measure(attend), start, count, error)
        if start:
            row["measured"] = "history without mask, then own keys causal, not merged"
        return row

    def _dense_row(
        self, timing: Timing, start: int, count: int, error: float | None
    ) -> dict[str, Any]:
        flops = causal_flops(count, start, self.model.num_heads, self.model.head_dim)
        return {**timing.fields(), "tflops": rate(flops, timing), "rel_error": rounded(error)}

    # -- decode --------------------------------------------------------------------------------

    def decode(self) -> None:
        """Measure one token of one request over each length."""
        for length in sorted(self.options.lengths, reverse=True):
            params = self.params(batch_size=1, context_len=length)
            self.session.attempt({"op": "decode", "impl": "ours", "params": params},
                                 partial(self._ours_decode, length))
            for name in self.options.baselines:
                if name != FLEX:
                    self.session.attempt(
                        {"op": "decode", "impl": name, "params": params},
                        partial(self._baseline_decode, name, length), ours=False)

    def _ours_decode(self, length: int) -> dict[str, Any]:
        small = self.require("decode", lambda: checks.check_decode(self.shape, self.device))
        item = self.input()
        q = item.make_queries(length - 1, 1)
        table = item.block_table[None, : -(-length // BLOCK_SIZE)].contiguous()
        lens = torch.tensor([length], device=self.device)
        scales = torch.full((1,), item.scale, device=self.device)

        def work() -> tuple[Tensor, Tensor]:
            return ops.decode_attention(q, item.cache, table, lens, item.rotary, scales)
        error = checks.check_decode_rows(work(), q, item, length)
        return self._decode_row(self.measure(work, flush_cache=True), length, max(small, error))

    def _baseline_decode(self, name: str, length: int) -> dict[str, Any]:
        item = self.input()
        plain = Plain.of(item.make_queries(length - 1, 1), item.k[:length], item.v[:length])
        attend = prepare_decode(name, plain)
        error = checks.check_plain(name, attend(), plain)
        return self._decode_row(self.measure(attend, flush_cache=True), length, error)

    def _decode_row(self, timing: Timing, length: int, error: float) -> dict[str, Any]:
        element = torch.empty((), dtype=self.dtype).element_size()
        num_bytes = 2.0 * length * self.model.num_kv_heads * self.model.head_dim * element
        return {**timing.fields(), "tb_per_s": rate(num_bytes, timing),
                "rel_error": rounded(error)}

    # -- pointwise -----------------------------------------------------------------------------

    def pointwise(self) -> None:
        """Measure norm, activation and the KV write of one prefill chunk; rates over bytes moved
        once."""
        rows, model, device = self.options.chunk_len, self.model, self.device
        hidden, residual = (torch.randn(rows, model.hidden_size, device=device, dtype=self.dtype)
                            for _ in range(2))
        weight = torch.ones(model.hidden_size, device=device, dtype=self.dtype)
        gate_up = torch.randn(
            rows // 4, 2 * model.intermediate_size, device=device, dtype=self.dtype)
        item = self.input()
        places = torch.arange(rows, device=device)
        blocks = torch.arange(rows // BLOCK_SIZE, device=device)
        k, v = item.k[:rows], item.v[:rows]
        works: tuple[tuple[str, Callable[[], object], int], ...] = (
            ("rms_norm", lambda: ops.rms_norm(hidden, weight, model.rms_norm_eps),
             2 * hidden.numel()),
            ("add_rms_norm",
             lambda: ops.add_rms_norm(hidden, residual, weight, model.rms_norm_eps),
             4 * hidden.numel()),
            ("silu_mul", lambda: ops.silu_mul(gate_up), 3 * gate_up.numel() // 2),
            ("store_kv", lambda: ops.store_kv(item.cache, k, v, places, places, blocks,
                                              item.rotary), 4 * k.numel()))
        for op, work, num_elements in works:
            self.session.attempt(
                {"op": op, "impl": "ours", "params": self.params(num_queries=rows)},
                partial(self._bytes_row, work, num_elements * hidden.element_size()))

    def _bytes_row(self, work: Callable[[], object], num_bytes: int) -> dict[str, Any]:
        error = self.require(
            "pointwise", lambda: checks.check_pointwise(self.shape, self.device))
        timing = self.measure(work, flush_cache=True)
        return {**timing.fields(), "tb_per_s": rate(float(num_bytes), timing),
                "rel_error": rounded(error)}


def copy_row(device: str, num_bytes: int, repeats: Repeats) -> dict[str, Any]:
    """Measure a device copy; bytes read and bytes written count."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, repeats, flush_cache=True)
    return {**timing.fields(), "tb_per_s": rate(2.0 * num_bytes, timing)}
