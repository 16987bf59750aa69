"""Compiles every GPU kernel that the ops launch, for Hopper, on a machine without a GPU.

A process of its own runs the ops' own host code over CPU tensors that pass for CUDA ones: each
launch compiles its kernel down to machine code and runs nothing. What the interpreter cannot tell,
this does: types that only a compiler checks, Gluon, shared memory and registers, and whether loops
carry what their source carries. `tests/ops/test_compiles.py` starts it.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from functools import cache as memoize
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from longspan.attention.cache import allocate_cache
from longspan.attention.rope import build_rotary
from longspan.config import DcaConfig
from longspan.ops import decode
from longspan.ops.dense import triton as prefill
from longspan.ops.select import top_k as threshold
from longspan.ops.select import triton as sparse_index
from longspan.ops.select import triton_recall
from longspan.ops.types import Budget, Fp8Weights, Int4Weights, KeySpans, QueryRotary

SHARED_BYTES, NUM_SMS = 232_448, 132
HEADS, KV_HEADS, DIM, BLOCK = 14, 2, 128, 128
CACHED, NEW, STRIDE = 2_560, 512, 1_024


class Driver:
    """What Triton asks in order to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_only(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Instead of a launch: compile, and say what came out."""
    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        begin_s = time.monotonic()
        built = launch(kernel, *args, grid=grid, warmup=True, **options)
        name, shared = kernel.fn.__name__, built.metadata.shared
        assert shared <= SHARED_BYTES, f"{name} takes {shared} bytes of shared memory"
        assert built.asm["cubin"]
        assert not num_lost(built.asm["source"]), f"a loop of {name} does not carry a value"
        print(f"{name} {shared} {time.monotonic() - begin_s:.2f}", flush=True)
        return built

    return compiled


@memoize
def num_lost(source: str) -> int:
    """Count the values that loops carry and that Triton's removal of dead ones takes away.

    Up to 3.7 at least it takes for dead what only bounds a loop within: that loop then has the
    bounds of the first turn in every turn. No kernel carries what is dead, so any is a fault."""
    common = [passes.common.add_inliner, passes.common.add_canonicalizer, passes.common.add_cse]
    return (num_carried(source, *common, passes.common.add_canonicalizer)
            - num_carried(source, *common, passes.gluon.add_canonicalizer,
                          passes.common.add_canonicalizer))


def num_carried(source: str, *steps: Callable[[Any], None]) -> int:
    """Count the values that loops carry after ``steps`` of the compiler."""
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".mlir") as file:
        file.write(source)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    manager = ir.pass_manager(context)
    for step in steps:
        step(manager)
    manager.run(module, "carried")
    loops = re.findall(r"iter_args\(([^)]*)\)", re.sub(r" loc\([^)]*\)", "", str(module)))
    return sum(loop.count("=") for loop in loops)


def pretend() -> None:
    """From here on launches compile, and the choices are those for a Hopper GPU."""
    from longspan.ops.dense import hopper, hopper_decode, hopper_rows
    from longspan.ops.moe import hopper as hopper_experts
    from longspan.ops.quant import triton_few
    from longspan.ops.select import hopper_tiles as hopper_probe
    from longspan.ops.select import triton_scouts
    from longspan.ops.tiles import hopper as hopper_tile

    # Nothing is computed, so what would be indices must not be whatever stands in memory.
    torch.empty = torch.zeros  # type: ignore[assignment]
    torch.empty_like = torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[method-assign]
    driver.set_active(Driver())
    JITFunction.run = compile_only(JITFunction.run)
    for module in (decode, prefill, hopper, hopper_decode, hopper_experts, hopper_rows,
                   hopper_probe, sparse_index):
        module.num_sms = lambda device: NUM_SMS  # type: ignore[attr-defined]
    for module in (hopper_probe, hopper_tile):
        module.is_hopper = lambda device: True  # type: ignore[attr-defined]
    prefill.__dict__["launch_options"] = lambda device, tile_len: {
        "KEYS": 128, "num_warps": 8, "num_stages": 2}
    sparse_index._clear_tiles = lambda call, first: (
        (first, call.mask_from) if call.padded_rows >= 64 else None)
    triton_few._is_compiled = lambda x: True
    triton_scouts._on_hopper = lambda queries, k: queries.shape[2] >= 256
    sparse_index._device_programs = lambda device: NUM_SMS  # type: ignore[assignment]


def main() -> None:
    """Every GPU path of `ops`, at the shapes of a 7B model."""
    from longspan.ops import pointwise
    from longspan.ops.dense import hopper, hopper_decode, hopper_rows
    from longspan.ops.sparse import hopper as hopper_sparse
    from longspan.ops.sparse import triton as vertical_slash

    pretend()
    rotary = build_rotary(head_dim=DIM, rope_theta=1e6, max_model_len=8_192,
                          dca=DcaConfig(chunk_size=1_280, local_size=256))
    cache = allocate_cache(num_blocks=40, block_size=BLOCK, num_kv_heads=KV_HEADS, head_dim=DIM,
                           dtype=torch.bfloat16, device="cpu", means=True)
    table, scale = torch.arange(40), DIM**-0.5
    q = torch.zeros(NEW, HEADS, DIM, dtype=torch.bfloat16)
    args = q, cache, table, CACHED, rotary, scale
    hopper.prefill_attention(*args)
    prefill.prefill_attention(*args)
    prefill.split_prefill_attention(*args, 2)
    for mode, strided, scouts in (
            ("tile", 0, 256), ("tile", 64, 128), ("tile", 0, 0), ("paper", 0, 0)):
        budget = Budget((900,) * HEADS, (700,) * HEADS, mode, 64, strided, 4, 100, scouts, 0.0, 64)
        selection = sparse_index.select_vertical_slash(*args, budget)
        vertical_slash.sparse_prefill_attention(*args, selection, False)
        if mode == "tile":
            # nothing was computed, and PyTorch's own steps index with what is there
            chosen = selection._replace(
                offsets=torch.zeros_like(selection.offsets), tiles=None, scouts=None)
            triton_recall.measure_recall(*args, chosen, NUM_SMS)
            vertical_slash.sparse_prefill_attention(*args, selection, True)
            for correction in (False, True):
                hopper_sparse.sparse_prefill_attention(*args, selection, correction)
    counts = torch.full((2,), 900, dtype=torch.int32)
    threshold.select_largest(  # long rows are first narrowed to candidates
        torch.zeros(2, 1 << 17), counts, torch.zeros(2, 900, dtype=torch.int64), 4, floor=0,
        backwards=False)
    decode.decode_attention(
        q[:2], cache, torch.zeros(2, 20, dtype=torch.int64), torch.tensor([900, 2_000]), rotary,
        torch.full((2,), scale))
    decode.decode_attention(
        q[:2], cache, torch.zeros(2, 20, dtype=torch.int64), torch.tensor([900, 2_000]), rotary,
        torch.full((2,), scale), KeySpans(torch.tensor([0, 1_024]), torch.tensor([900, 976])))
    decode.decode_attention(  # half of each block
        q[:2], cache._replace(k=cache.k[:, :64], v=cache.v[:, :64]),
        torch.zeros(2, 20, dtype=torch.int64),
        torch.tensor([900, 2_000]), rotary, torch.full((2,), scale),
        KeySpans(torch.tensor([0, 0]), torch.tensor([452, 1_024]), 128, 64))
    for few in (2, 16):
        decode.prefill_attention(q[:few], cache, table, CACHED, rotary, scale)
    for few in (8, 16):  # one consumer and two
        hopper_rows.prefill_attention(q[:few], cache, table, CACHED, rotary, scale)
    for few in (1, 2, 4, 9):  # 8 to 64 lanes
        hopper_decode.prefill_attention(q[:few], cache, table, CACHED, rotary, scale)
    x, weight = torch.zeros(9, 3_584, dtype=torch.bfloat16), torch.ones(3_584, dtype=torch.bfloat16)
    pointwise.rms_norm(x, weight, 1e-6)
    pointwise.add_rms_norm(x, x.clone(), weight, 1e-6)
    pointwise.silu_mul(x)
    rows, positions = torch.zeros(9, KV_HEADS, DIM, dtype=torch.bfloat16), torch.arange(9)
    pointwise.store_kv(cache, rows, rows, positions, positions, table[:1], rotary)
    compile_block_rows()
    compile_int8_kv(q, table, rotary)
    compile_experts()
    compile_quantised()


def compile_block_rows() -> None:
    """Compile what packs blocks, for rows of any length."""
    from longspan.ops import block_rows

    for width in (128, 8, 7):
        table = block_rows.row_table([torch.zeros(2, width, dtype=torch.uint8)], [0], width)
        packed, blocks = torch.zeros(2, width, dtype=torch.uint8), torch.arange(2)
        block_rows.pack_blocks(table, blocks, packed)
        block_rows.unpack_blocks(table, blocks, packed)


def compile_quantised() -> None:
    """Compile what rounds activations, makes weights plain, and multiplies a few rows."""
    from longspan.ops.quant import triton_dense, triton_few, triton_rows

    x, weight = torch.zeros(9, 3_584, dtype=torch.bfloat16), torch.ones(3_584, dtype=torch.bfloat16)
    for group in (0, 128):
        triton_rows.quantize(x, group)
        triton_rows.rms_norm(x, x.clone(), weight, 1e-6, group)
        triton_rows.rms_norm(x, None, weight, 1e-6, group)
        triton_rows.silu_mul(x, group)
    values = torch.zeros(512, 3_584, dtype=torch.float8_e4m3fn)
    for scales in (torch.zeros(512, 1), torch.zeros(4, 28)):
        triton_few.fp8_linear(x, Fp8Weights(values, scales), weight[:512])
        triton_dense.dequantize(Fp8Weights(values, scales), torch.bfloat16)
    for group in (32, 64, 128, 3_584):
        groups = 3_584 // group
        parts = (torch.zeros(512, 1_792, dtype=torch.uint8),
                 torch.zeros(512, groups, dtype=torch.float16),
                 torch.zeros(512, groups, dtype=torch.uint8))
        for order in (None, torch.arange(3_584, dtype=torch.int32)):
            triton_few.int4_linear(x, Int4Weights(*parts, order), None)
            triton_few.int4_linear(x.repeat(7, 1), Int4Weights(*parts, order), None)
            triton_dense.dequantize(Int4Weights(*parts, order), torch.bfloat16)


def compile_int8_kv(q: Tensor, table: Tensor, rotary: QueryRotary) -> None:
    """Compile what writes and reads keys and values in int8."""
    from longspan.ops.dense import hopper_decode
    from longspan.ops.quant import triton_kv

    cache = allocate_cache(
        num_blocks=40, block_size=BLOCK, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=q.dtype,
        device="cpu", means=True, k_gain=torch.ones(KV_HEADS, DIM))
    for count in (9, 99):
        rows, positions = q[:count, :KV_HEADS], torch.arange(count)
        triton_kv.store_kv(cache, rows, rows, positions, positions, table[:1], rotary)
    triton_kv.dense_kv(cache, table, CACHED)
    for count in (1, 2, 16):
        decode.prefill_attention(q[:count], cache, table, CACHED, rotary, DIM**-0.5)
    for count in (1, 2, 4, 9):  # 8 to 64 lanes
        hopper_decode.prefill_attention(q[:count], cache, table, CACHED, rotary, DIM**-0.5)
    lens = torch.full((9,), CACHED)
    hopper_decode.decode_attention(q[:9], cache, table.repeat(9, 1), lens, rotary, lens.float())


def compile_experts() -> None:
    """Compile the kernels of routed experts at the sizes of Qwen3-30B-A3B, with all tiles."""
    from longspan.ops.moe import triton as experts
    from longspan.ops.moe import triton_routing

    weights, chosen = triton_routing.route(torch.zeros(9, 128), 8, True)
    triton_routing.group(torch.zeros(999, 8, dtype=torch.int32), 128)  # so many by tallies
    groups = triton_routing.group(chosen, 128)
    x = torch.zeros(9, 2_048, dtype=torch.bfloat16)
    gate_up = torch.zeros(1, dtype=torch.bfloat16).expand(128, 1_536, 2_048)
    down = torch.zeros(1, dtype=torch.bfloat16).expand(128, 2_048, 768)
    # one element stands for all of them, as nothing is read
    setattr(gate_up, "is_contiguous", lambda: True)  # noqa: B010
    setattr(down, "is_contiguous", lambda: True)  # noqa: B010
    for up_tiles, down_tiles in (experts.FEW, experts.SOME, experts.MANY):
        hidden = experts.expert_up(x, groups, gate_up, 8, up_tiles)
        routed = experts.expert_down(hidden, groups, weights, down, down_tiles)
    values = (torch.zeros(128, 1_536, 2_048, dtype=torch.float8_e4m3fn),
              torch.zeros(128, 2_048, 768, dtype=torch.float8_e4m3fn))
    by_rows = [part.new_zeros(*part.shape[:2], 1, dtype=torch.float32) for part in values]
    by_blocks = [part.new_zeros(128, part.shape[1] // 128, part.shape[2] // 128,
                                dtype=torch.float32) for part in values]
    for up_tiles, down_tiles in (experts.FEW, experts.SOME, experts.MANY):
        for scales in (by_rows, by_blocks):
            hidden = experts.expert_up(x, groups, Fp8Weights(values[0], scales[0]), 8, up_tiles)
            routed = experts.expert_down(
                hidden, groups, weights, Fp8Weights(values[1], scales[1]), down_tiles)
    experts.combine(x, routed, weights)
    experts.combine(x, routed, weights, groups.order)
    compile_hopper_experts(values, by_rows)


def compile_hopper_experts(values: tuple[Tensor, Tensor], scales: list[Tensor]) -> None:
    """Compile the products of prefills of many rows, both types of weights."""
    from longspan.ops.moe import hopper, triton_routing
    from longspan.ops.quant import triton_rows

    groups = triton_routing.group(torch.zeros(99, 8, dtype=torch.int32), 128)
    x = torch.zeros(99, 2_048, dtype=torch.bfloat16)
    tiles = hopper.list_tiles(groups, 8, x)
    plain = (torch.zeros(2, 1_536, 2_048, dtype=torch.bfloat16),
             torch.zeros(2, 2_048, 768, dtype=torch.bfloat16))
    hopper.expert_down(hopper.expert_up(x, tiles, plain[0]), tiles, plain[1])
    up, down = (Fp8Weights(*pair) for pair in zip(values, scales, strict=True))
    rows = triton_rows.quantize(x, 0)
    tiles = hopper.list_tiles(groups, 8, rows)
    hopper.expert_down(hopper.expert_up(rows, tiles, up), tiles, down)


if __name__ == "__main__":
    main()
