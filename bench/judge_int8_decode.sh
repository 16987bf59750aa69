#!/usr/bin/env bash
# From the repository's root on a machine with a Hopper GPU. Decides first, then times: under 120 s.
# OUT: where rows go; PYTHON: the interpreter with torch and triton.
set -u
OUT=${OUT:-/tmp/int8-out}; PYTHON=${PYTHON:-python}; mkdir -p "$OUT"
export PYTHONPATH=$PWD
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$OUT/cache} OMP_NUM_THREADS=1
SIDE=$("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 4")  # most of the time is compiling
run_tests() { timeout "$1" "$PYTHON" -m pytest -q --maxfail 5 -p no:cacheprovider $SIDE -m gpu "${@:2}" 2>&1 | tail -40; }
echo "== tests that decide"
run_tests 55 tests/gpu/test_hopper_decode_cuda.py | tee "$OUT/tests.txt"
echo "== the present kernel and the new one, one layer of the 7B shape, us and TB/s"
timeout 35 "$PYTHON" - <<'P' 2>&1 | tee "$OUT/kernels.txt"
import statistics, torch
from longspan.attention.cache import allocate_cache
from longspan.attention.rope import build_rotary
from longspan.config import DcaConfig
from longspan.ops import decode
from longspan.ops.dense import hopper_decode, hopper_rows
from longspan.ops.dense.hopper_decode import Launch

rotary = build_rotary(head_dim=128, rope_theta=1e7, max_model_len=1_000_000, device="cuda",
                      dca=DcaConfig(chunk_size=262_144, local_size=8_192))

def fill(x):
    if x.dtype == torch.int8:
        x.view(torch.int32).random_()
    else:
        x.normal_().abs_() if x.dtype == torch.float32 else x.normal_()

def us(work, calls):
    work(); torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(); graph.replay(); end.record(); torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)

for is_int8 in (True, False):
    for context, batch in ((131_072, 1), (1_000_000, 1), (131_072, 8), (1_000, 64)):
        blocks = -(-context // 128)
        caches = [allocate_cache(num_blocks=blocks * batch, block_size=128, num_kv_heads=4,
                                 head_dim=128, dtype=torch.bfloat16, device="cuda", means=False,
                                 **({"k_gain": torch.ones(4, 128)} if is_int8 else {}))
                  for _ in range(4)]
        for cache in caches:
            for part in cache.by_block().values():
                fill(part)
        tables = torch.randperm(blocks * batch, device="cuda").view(batch, blocks)
        lens = torch.full((batch,), context, device="cuda")
        scales = torch.full((batch,), 0.01, device="cuda")
        q = torch.randn(batch, 28, 128, device="cuda", dtype=torch.bfloat16)
        num_bytes = 2 * batch * context * 4 * (132 if is_int8 else 256)
        ways = {"present": lambda c: decode.decode_attention(q, c, tables, lens, rotary, scales)}
        launches = ([Launch(2, 3, 80), Launch(1, 6, 168)] if is_int8
                    else [Launch(1, 3, 168)])
        for launch in launches:
            ways[f"new {tuple(launch)}"] = lambda c, launch=launch: hopper_decode.attend(
                q, c, tables, lens, rotary, scales, 1, launch)
        if batch == 1:
            for rows in (2, 9, 16) if is_int8 else ():
                more = torch.randn(rows, 28, 128, device="cuda", dtype=torch.bfloat16)
                for name, module in (("present", decode), ("new", hopper_decode)):
                    ways[f"{name}, {rows} rows"] = lambda c, module=module, more=more: (
                        module.prefill_attention(more, c, tables[0], context - len(more), rotary,
                                                 0.01))
            if not is_int8:
                ways["ring, 1 row"] = lambda c: hopper_rows.prefill_attention(
                    q, c, tables[0], context - 1, rotary, 0.01)
        for name, way in ways.items():
            def work(way=way):
                for cache in caches:
                    way(cache)
            try:
                time_us = us(work, len(caches))
            except Exception as error:
                print("int8" if is_int8 else "bf16", context, batch, name, repr(error)[:200])
                continue
            print(f"{'int8' if is_int8 else 'bf16'} {context:>9,} x {batch} {name:24} "
                  f"{time_us:8.1f} us {num_bytes / time_us / 1e6:5.2f} TB/s "
                  f"{28 * time_us / 1000:7.2f} ms of 28 layers", flush=True)
        del caches
        torch.cuda.empty_cache()
P
echo "== steps"
timeout 30 "$PYTHON" -m longspan bench decode --shape qwen2.5-7b --contexts 131072,1000000 \
  --batch 1 --kv-dtype int8 --steps 20 --device cuda --rows 1,9 --budget-s 25 --out "$OUT" 2>&1 | tail -12
