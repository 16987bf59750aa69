# ruff: noqa
"""From the repository's root on a machine with a Hopper GPU: PYTHONPATH=. python3 judge_decode.py

Times the present decode kernel and Hopper's own, one layer of the 7B shape. A case that takes longer
than 20 s, compiling included, is a hang: it is said, and the process ends.
"""
import os
import statistics
import threading
import time

import torch
from longspan.attention.cache import allocate_cache
from longspan.attention.rope import build_rotary
from longspan.config import DcaConfig
from longspan.ops import decode
from longspan.ops.dense import hopper_decode, hopper_rows
from longspan.ops.dense.hopper_decode import Launch

PATIENCE_S = 20
CASES = ((131_072, 1), (1_000_000, 1), (131_072, 8), (1_000, 64))
ROWS = (2, 4, 8)
rotary = build_rotary(head_dim=128, rope_theta=1e7, max_model_len=1_000_000, device="cuda",
                      dca=DcaConfig(chunk_size=262_144, local_size=8_192))
running = ("", float("inf"))  # the case and when it is a hang


def watch():
    while True:
        time.sleep(0.2)
        name, deadline = running
        if time.monotonic() > deadline:
            print(f"HANG {name}", flush=True)
            os._exit(1)


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


def error_of(found, expected):
    """The largest difference of outputs, in units of their own spread, and of LSEs."""
    (out, lse), (out2, lse2) = found, expected
    spread = out2.float().std()
    return (float((out.float() - out2.float()).abs().max() / spread),
            float((lse - lse2).abs().max()))


def judge(context, batch, is_int8):
    global running
    kind = "int8" if is_int8 else "bf16"
    running = (f"{kind} {context:,} x {batch} filling of caches", time.monotonic() + PATIENCE_S)
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
    scales = torch.full((batch,), 0.01 if is_int8 else 0.09, device="cuda")
    q = torch.randn(batch, 28, 128, device="cuda", dtype=torch.bfloat16)
    num_bytes = 2 * batch * context * 4 * (132 if is_int8 else 256)

    # name, way, the name of what it must agree with
    ways = [("present", lambda c: decode.decode_attention(q, c, tables, lens, rotary, scales), None)]
    launches = (Launch(1, 6, 168), Launch(2, 3, 80)) if is_int8 else (Launch(1, 3, 168),)
    for launch in launches:
        ways.append((f"new {tuple(launch)}", lambda c, launch=launch: hopper_decode.attend(
            q, c, tables, lens, rotary, scales, 1, launch), "present"))
    if batch == 1 and not is_int8:
        ways.append(("ring, 1 row", lambda c: hopper_rows.prefill_attention(
            q, c, tables[0], context - 1, rotary, 0.09), "present"))
    if batch == 1 and is_int8:
        for rows in ROWS:
            more = torch.randn(rows, 28, 128, device="cuda", dtype=torch.bfloat16)
            args = (tables[0], context - rows, rotary, 0.01)
            ways.append((f"present, {rows} rows", lambda c, more=more, args=args:
                         decode.prefill_attention(more, c, *args), None))
            ways.append((f"new, {rows} rows", lambda c, more=more, args=args:
                         hopper_decode.prefill_attention(more, c, *args), f"present, {rows} rows"))
            if rows == 2:
                ways.append((f"new (1, 6, 168), {rows} rows", lambda c, more=more, rows=rows:
                             hopper_decode.attend(more, c, tables, lens, rotary, scales, rows,
                                                  Launch(1, 6, 168)), f"present, {rows} rows"))
    results = {}
    for name, way, like in ways:
        def work(way=way):
            for cache in caches:
                way(cache)
        case = f"{kind} {context:>9,} x {batch} {name:24}"
        running = (case, time.monotonic() + PATIENCE_S)
        begin_s = time.monotonic()
        try:
            results[name] = way(caches[0])
            torch.cuda.synchronize()
            time_us = us(work, len(caches))
            errors = ""
            if like in results:
                out, lse = error_of(results[name], results[like])
                errors = f" differs by {out:.4f} of the spread, lse {lse:.5f}"
        except Exception as error:
            print(case, repr(error)[:200], flush=True)
            continue
        print(f"{case} {time_us:8.1f} us {num_bytes / time_us / 1e6:5.2f} TB/s "
              f"{28 * time_us / 1000:7.2f} ms of 28 layers{errors} "
              f"({time.monotonic() - begin_s:.1f} s)", flush=True)
    del caches, results, ways
    running = ("", float("inf"))
    torch.cuda.empty_cache()


threading.Thread(target=watch, daemon=True).start()
for context, batch in CASES:
    for is_int8 in (True, False):
        judge(context, batch, is_int8)
print("done", flush=True)
