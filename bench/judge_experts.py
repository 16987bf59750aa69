# ruff: noqa
"""Times experts of Qwen3-30B-A3B, us a layer, for 1, 2, 4, 8, 16 tokens: as they are, constants off,
kernels of before; then tiles of one token. In the root: PYTHONPATH=. python3 bench/judge_experts.py

"experts": as `bench ops` times them (8 layers' steps in a graph, cold L2). "norm too": with the norm
that stands before the router in the model; only it says what a model gains of ROUTER_EARLY.
"""
import sys
import time
from contextlib import contextmanager

import torch

from longspan.bench.shapes import Shape
from longspan.bench.timing import Repeats, measure, recorded
from longspan.model.experts import RoutedMLP
from longspan.ops import add_rms_norm, pointwise
from longspan.ops.moe import triton_few, triton_router
from longspan.ops.moe import triton as kernels
from longspan.ops.moe.triton import Tiles
from longspan.weight_form import WeightForm, WeightForms

BEGIN = time.monotonic()
BUDGET_S = 57.0
BATCHES, STEPS, REPEATS = (1, 2, 4, 8, 16), 8, Repeats(most=15, max_s=0.2)
model = Shape.make("qwen3-30b-a3b").model
weight = None


def make(kind):
    torch.manual_seed(0)
    forms = {} if kind == "bf16" else {"forms": WeightForms(WeightForm("fp8-rows"))}
    mlp = RoutedMLP(model.hidden_size, model.experts, dtype=torch.bfloat16, device="cuda", **forms)
    mlp.gate.weight.normal_(0.0, 0.02)
    if kind == "bf16":
        for parameter in mlp.parameters():
            parameter.normal_(0.0, 0.02)
    else:
        for linear in (mlp.experts.gate_up, mlp.experts.down):
            linear.fill_randomly(0.02, torch.Generator("cuda").manual_seed(0))
    pairs = {count: [tuple(torch.randn(count, model.hidden_size, device="cuda").bfloat16()
                           for _ in range(2)) for _ in range(STEPS)] for count in BATCHES}
    return mlp, pairs


def times(mlp, pairs, only=BATCHES, norm=False):
    found = []
    for count in only:
        rows = [(hidden.clone(), x) for hidden, x in pairs[count]]  # the same for all

        def work():
            for hidden, x in rows:
                if norm:
                    x = add_rms_norm(x, hidden, weight, 1e-6)[0]
                mlp.add_to(hidden, x)
        timing = measure(recorded(work, "cuda"), "cuda", REPEATS, flush_cache=True)
        found.append(1e3 * timing.share(STEPS).median_ms)
    return found


def show(kind, what, found, value=""):
    print(f"{kind:5} {what:22} {value!s:36} " + " ".join(f"{us:7.1f}" for us in found)
          + f"   {time.monotonic() - BEGIN:5.1f} s", flush=True)


@contextmanager
def having(*settings):
    """Set (module, name, value)s for a while."""
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def late(value=False):
    return (triton_few, "ROUTER_EARLY", value), (pointwise, "ROUTER_EARLY", value)


def old(*modules):
    return tuple((module, "supports", lambda *_: False) for module in modules)


def constants(kind, mlp, pairs):
    settings = [
        ("as it is", ()), ("ALONE off", ((triton_few, "ALONE", False),)),
        ("ROUTER_EARLY off", late()), ("both off", ((triton_few, "ALONE", False), *late())),
        ("products of before", old(triton_few)),
        ("all of before", (*old(triton_few, triton_router), *late())), ("as it is, again", ())]
    for what, changed in settings:
        with having(*changed):
            show(kind, what, times(mlp, pairs), "experts")
    # 16 tokens by the new products: their limit is lifted
    with having((triton_few, "MAX_TOKENS", 16)):
        show(kind, "new products at 16", times(mlp, pairs, (16,)), "experts")
    for what, changed in (settings[0], settings[1], settings[2], settings[5]):
        with having(*changed):
            show(kind, what, times(mlp, pairs, (1, 8), norm=True), "norm too (1, 8 tokens)")


UPS = {"bf16": [(16, 128, 8, 2), (16, 256, 6, 2), (16, 256, 3, 2), (16, 128, 6, 4), (16, 128, 4, 2),
                (8, 256, 6, 2)],
       "fp8": [(32, 512, 4, 4), (16, 512, 4, 2), (16, 256, 6, 2), (32, 256, 6, 4)]}
DOWNS = {"bf16": [(32, 256, 4, 4), (32, 128, 7, 4), (16, 256, 6, 2), (16, 256, 3, 2),
                  (64, 256, 3, 8), (16, 128, 7, 2), (32, 256, 3, 2)],
         "fp8": [(32, 256, 4, 4), (64, 256, 3, 8), (32, 128, 7, 4), (16, 256, 4, 2)]}


def tiles(kind, mlp, pairs):
    """Tiles of one token; the best ones with what they give at 2 and 8, too (not of fp8, which has
    tiles of its own there)."""
    name = "TILES" if kind == "bf16" else "FP8_TILES_OF_ONE"
    best, least = list(getattr(triton_few, name)), times(mlp, pairs, (1,))[0]
    for index, choices in enumerate((UPS[kind], DOWNS[kind])):
        start = list(best)
        for numbers in choices:
            if time.monotonic() - BEGIN > BUDGET_S:
                print("out of time", flush=True)
                return
            tried = list(start)
            tried[index] = Tiles(16, *numbers)
            with having((triton_few, name, tuple(tried))):
                try:
                    found = times(mlp, pairs, (1,))
                except Exception as error:  # too much shared memory
                    print(kind, ("up", "down")[index], numbers, repr(error)[:80], flush=True)
                    continue
            show(kind, ("up", "down")[index], found, numbers)
            if found[0] < least:
                least, best = found[0], tried
    with having((triton_few, name, tuple(best))):
        found = times(mlp, pairs, (1, 2, 8) if kind == "bf16" else (1,))
        show(kind, "best of 1 (1, 2, 8)", found, tuple(tuple(part[1:]) for part in best))


def profile(what, mlp, pairs):
    """Kernels of one token, us each; those that begin early are counted while they wait."""
    from torch.profiler import ProfilerActivity, profile as record

    for hidden, x in pairs[1][:1]:
        mlp.add_to(hidden, x)
    with record(activities=[ProfilerActivity.CUDA]) as found:
        torch.empty(256 * 1024**2, dtype=torch.uint8, device="cuda").zero_()
        for hidden, x in pairs[1]:
            mlp.add_to(hidden, x)
        torch.cuda.synchronize()
    for row in found.key_averages():
        if row.key.startswith("_"):
            print(f"  {what:5} {row.key[:30]:30} {row.count:4} {row.device_time:7.2f}", flush=True)


def compile_on_cpu():
    """Whether all tiles compile for Hopper, and how much shared memory they take: without a GPU."""
    from tests.ops import compile_for_hopper
    from longspan.ops.types import Fp8Weights

    compile_for_hopper.pretend()
    x, experts = torch.zeros(1, 2048).bfloat16(), torch.zeros(1, 8, dtype=torch.int32)
    one = torch.zeros(1).bfloat16()
    plain = [one.expand(*shape) for shape in ((128, 1536, 2048), (128, 2048, 768))]
    for part in plain:
        part.is_contiguous = lambda: True
    rounded = [Fp8Weights(torch.zeros(1, dtype=torch.uint8).expand(part.shape).view(
        torch.float8_e4m3fn), torch.zeros(*part.shape[:2], 1)) for part in plain]
    for part in rounded:
        part.values.is_contiguous = lambda: True
    for kind, (up, down) in (("bf16", plain), ("fp8", rounded)):
        for numbers in UPS[kind]:
            print(kind, numbers, end=" ")
            try:
                hidden = triton_few.expert_up(x, experts, up, Tiles(16, *numbers))
            except Exception as error:
                print(repr(error)[:200])
        for numbers in DOWNS[kind]:
            print(kind, numbers, end=" ")
            try:
                triton_few.expert_down(x, hidden, torch.zeros(1, 8), experts, down, Tiles(16, *numbers))
            except Exception as error:
                print(repr(error)[:200])


if __name__ == "__main__":
    with torch.inference_mode():
        if "cpu" in sys.argv:
            compile_on_cpu()
        else:
            print(f"{'':66}" + " ".join(f"{count:7}" for count in BATCHES), flush=True)
            weight = torch.ones(model.hidden_size, device="cuda", dtype=torch.bfloat16)
            made = {kind: make(kind) for kind in ("bf16", "fp8")}
            for part in (constants, tiles):
                for kind, (mlp, pairs) in made.items():
                    part(kind, mlp, pairs)
            for kind, (mlp, pairs) in made.items():
                if time.monotonic() - BEGIN < BUDGET_S:
                    profile(kind, mlp, pairs)
