#!/bin/bash
# On a GPU machine, in the root of the checkout: tests that decide, the benchmark's rows (under 90 s
# together), then a sweep of what only a GPU can decide. SWEEP=0 leaves the sweep out.
set -u -o pipefail
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
PY=${PY:-python3}
$PY -m pytest -q -m gpu -x -p no:cacheprovider tests/gpu/test_few_experts_cuda.py \
  "tests/gpu/test_experts_cuda.py::test_a_layer_of_experts" \
  "tests/gpu/test_experts_cuda.py::test_a_graph_reads_what_its_tokens_take" || echo "TESTS FAILED"
$PY -m longspan bench ops --shape qwen3-30b-a3b --only experts
[ "${SWEEP:-1}" = 0 ] || timeout ${SWEEP_S:-240} $PY - <<'PYTHON'
"""Times a layer's experts, us, for batches of 1, 2, 8 and 16: constants one after the other."""
import torch
from longspan.bench.shapes import Shape
from longspan.bench.timing import Repeats, measure, recorded
from longspan.model.experts import RoutedMLP
from longspan.ops.moe import cuda, dependent_launch, triton_few, triton_router
from longspan.ops.moe import triton as kernels
from longspan.ops.moe.triton import Tiles
from longspan.weight_form import WeightForm, WeightForms

BATCHES, STEPS = (1, 2, 8, 16), 8
model = Shape.make("qwen3-30b-a3b").model
early = dependent_launch.early_launch(torch.device("cuda", 0))


def make(kind):
    torch.manual_seed(0)
    forms = () if kind == "bf16" else (WeightForms(WeightForm("fp8-rows")),)
    mlp = RoutedMLP(model.hidden_size, model.experts, dtype=torch.bfloat16, device="cuda",
                    **({"forms": forms[0]} if forms else {}))
    mlp.gate.weight.normal_(0.0, 0.02)
    if kind == "bf16":
        for parameter in mlp.parameters():
            parameter.normal_(0.0, 0.02)
    else:
        for linear in (mlp.experts.gate_up, mlp.experts.down):
            linear.fill_randomly(0.02, torch.Generator("cuda").manual_seed(0))
    pairs = {count: [(torch.randn(count, model.hidden_size, device="cuda").bfloat16(),
                      torch.randn(count, model.hidden_size, device="cuda").bfloat16())
                     for _ in range(STEPS)] for count in BATCHES}
    return mlp, pairs


def times(mlp, pairs, only=BATCHES):
    found = []
    for count in only:
        def work():
            for hidden, x in pairs[count]:
                mlp.add_to(hidden, x)
        timing = measure(recorded(work, "cuda"), "cuda", Repeats(most=20), flush_cache=True)
        found.append(1e3 * timing.share(STEPS).median_ms)
    return found


def show(kind, what, value, found):
    print(f"{kind:5} {what:10} {value!s:28} " + " ".join(f"{us:8.1f}" for us in found), flush=True)


def sweep(kind):
    mlp, pairs = make(kind)
    name = "TILES" if kind == "bf16" else "FP8_TILES"
    best = list(getattr(triton_few, name))
    base = times(mlp, pairs)
    show(kind, "as it is", "", base)
    wide = 1 if kind == "bf16" else 2  # as many bytes a step
    ups = [(32, 128, 3, 4), (32, 128, 6, 4), (32, 64, 6, 4), (16, 128, 4, 4), (16, 128, 6, 2),
           (16, 256, 4, 4), (64, 64, 4, 4), (64, 128, 3, 4), (64, 128, 4, 8), (32, 256, 3, 4)]
    downs = [(32, 128, 3, 4), (32, 128, 6, 4), (32, 64, 6, 4), (16, 128, 4, 4), (16, 128, 6, 2),
             (16, 256, 4, 4), (64, 128, 3, 4), (64, 128, 4, 8), (32, 256, 3, 4), (128, 64, 4, 8)]
    least = base[0]
    for index, (part, choices) in enumerate((("up", ups), ("down", downs))):
        start = list(best)
        for columns, depth, stages, warps in choices:
            tried = list(start)
            tried[index] = Tiles(16, columns, depth * wide, stages, warps)
            setattr(triton_few, name, tuple(tried))
            try:
                found = times(mlp, pairs)
            except Exception as error:  # too much shared memory
                print(kind, part, tuple(tried[index][1:]), repr(error)[:90])
                continue
            show(kind, part, tuple(tried[index][1:]), found)
            if found[0] < least:
                least, best = found[0], tried
    setattr(triton_few, name, tuple(best))
    show(kind, "best of 1", tuple(tuple(tiles[1:]) for tiles in best), times(mlp, pairs))
    triton_few.PREFETCH = False
    show(kind, "prefetch", False, times(mlp, pairs))
    triton_few.PREFETCH = True
    for module in (triton_few, triton_router):
        module.early_launch = lambda device: {"EARLY": False}
    show(kind, "early", False, times(mlp, pairs))
    triton_few.early_launch = lambda device: early
    show(kind, "early", "all but the router", times(mlp, pairs))
    triton_router.early_launch = lambda device: early
    supports = triton_few.supports
    triton_few.supports = lambda *_: False
    show(kind, "products", "of before", times(mlp, pairs))
    router_supports, triton_router.supports = triton_router.supports, lambda *_: False
    show(kind, "all", "of before", times(mlp, pairs))
    profile("before " + kind, mlp, pairs)
    triton_few.supports, triton_router.supports = supports, router_supports
    profile("now " + kind, mlp, pairs)


def profile(what, mlp, pairs):
    """Kernels of one token, us each; those that begin early are counted while they wait."""
    from torch.profiler import ProfilerActivity, profile as record

    hidden, x = pairs[1][0]
    mlp.add_to(hidden, x)
    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            torch.empty(256 * 1024**2, dtype=torch.uint8, device="cuda").zero_()
            for hidden, x in pairs[1]:
                mlp.add_to(hidden, x)
        torch.cuda.synchronize()
    for row in found.key_averages():
        print(f"  {what:12} {row.key[:60]:60} {row.count:4} {row.device_time:8.2f}", flush=True)


with torch.inference_mode():
    print(f"{'':46} " + " ".join(f"{count:8}" for count in BATCHES))
    for kind in ("bf16", "fp8"):
        sweep(kind)
PYTHON
