"""Which variants of its kernels a prefill launches on a Hopper GPU, on a machine without one.

Triton compiles a kernel anew for other constants, for integers that are multiples of 16 or 1, and
for pointers that are less aligned. A process of its own runs the engine's own model over tensors
that have a shape and no memory, and notes the key of each launch instead of launching.
`tests/engine/setup/test_launch_keys.py` starts it.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction, compute_cache_key

from longspan.attention import ranks, shared_decode
from longspan.attention.ranks import Gathering, RankGroup, Swapping
from longspan.bench.engine.engine import EngineSizes, plan_engine
from longspan.bench.shapes import Shape
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.control.transport import LocalTransport
from longspan.engine.device import load_stages
from longspan.engine.device.memory import DeviceMemory
from longspan.engine.device.runner import Runner
from longspan.engine.device.sampling import Sampler
from longspan.engine.request import Request, SamplingParams
from longspan.engine.setup.compile_ahead import compile_steps
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.step import ScheduledBatch, StepResult
from longspan.ops.select import triton as select
from longspan.ops.select import triton_scouts
from longspan.units import GIB
from tests.doubles import ComputedStep
from tests.ops.compile_for_hopper import SHARED_BYTES, pretend

EMPTY, EMPTY_LIKE, NEW_EMPTY = torch.empty, torch.empty_like, torch.Tensor.new_empty
H200 = DeviceMemory(total_bytes=140 * GIB, free_bytes=139 * GIB)
"""The machine that sizes are planned for."""


class Launches:
    """Takes the place of launches: keeps each kernel's key, with what it was made of."""

    def __init__(self) -> None:
        self.keys: dict[str, set[str]] = {}

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Note one launch."""
        options["debug"] = options.get("debug", kernel.debug)
        options["instrumentation_mode"] = ""
        *_, binder = kernel.device_caches[0]
        _, specialization, rest = binder(*args, **options)
        key = compute_cache_key({}, specialization, rest)
        self.keys.setdefault(kernel.fn.__name__, set()).add(key)


class Recorder:
    """A runner that computes nothing and keeps the steps."""

    def __init__(self) -> None:
        self.steps: list[ScheduledBatch] = []

    def launch(self, batch: ScheduledBatch) -> ComputedStep:
        """Keep it."""
        self.steps.append(batch)
        sampled = sum(item.sampling is not None for item in batch.slices)
        return ComputedStep(StepResult(
            step_id=batch.step_id, epoch=batch.epoch, token_ids=(7,) * sampled, elapsed_s=0.01,
            kept_pairs=1.0, causal_pairs=4.0))


def prompt_steps(engine: ResolvedEngine, length: int, sparse: bool) -> list[ScheduledBatch]:
    """Schedule one prompt, up to its first token."""
    recorder = Recorder()
    loop = Loop(Scheduler(engine.scheduler_config()), LocalTransport(recorder))
    loop.add(Request(request_id="0", prompt_ids=array("i", [5] * length), sparse=sparse,
                     params=SamplingParams(max_tokens=1, ignore_eos=True)))
    while not loop.is_idle:
        loop.turn()
    return recorder.steps


def runner_without_memory(engine: ResolvedEngine) -> Runner:
    """Build the engine's runner of tensors without memory."""
    config = replace(engine.config, device="meta")
    stages = load_stages.load_stages(
        engine.path, engine.model, config, engine.memory, dca=engine.dca, plan=engine.plan,
        slices=[range(engine.model.num_layers)])
    grammars: Any = None  # nobody asks for one
    sampler = Sampler(vocab_size=engine.model.vocab_size, device="meta", grammars=grammars)
    return Runner(stages, sampler, dca=engine.dca, device="meta", num_slots=1,
                  piece_rows=engine.scheduler_config().piece_rows,
                  block_size=engine.memory.block_size)


def keys_of(runner: Runner, steps: Iterable[ScheduledBatch]) -> dict[str, set[str]]:
    """Return each kernel's keys in some steps."""
    launches = Launches()
    JITFunction.run = lambda kernel, *args, **options: launches(kernel, *args, **options)
    with torch.inference_mode():
        for step in steps:
            begun = runner.begin(step)
            if begun.apart is not None or begun.packed is not None:
                runner._logits(begun.inputs, begun.apart, begun.packed)
    return launches.keys


class Done:
    """Work of a group that is over."""

    def wait(self) -> None:
        """Return at once."""


class Absent(RankGroup):
    """A group whose other ranks are not there: what they send is memory that nobody reads."""

    def begin_gather(self, x: Tensor) -> Gathering:
        """Take this rank's part for everything."""
        done: Any = Done()
        return Gathering(done, torch.empty(
            self.size * x.numel() * x.element_size(), dtype=torch.uint8, device=x.device),
            x.contiguous())

    def begin_swap(self, sent: Any, received: Any) -> Swapping:
        """Send nothing."""
        return Swapping([], [])

    def beside(self) -> AbstractContextManager[None]:
        """Leave nothing to an exchange."""
        return nullcontext()


def main(shape: str, layers: int, lengths: list[int], num_ranks: int = 1) -> None:
    """Print the launches that a prompt of each length makes and the steps before it do not; with
    several ranks those of the first."""
    pretend()
    without_memory()
    ranks.LEAST_ROWS["meta"] = ranks.LEAST_ROWS["cuda"]
    shared_decode.LEAST_BYTES["meta"] = shared_decode.LEAST_BYTES["cuda"]
    for length in lengths:
        engine = plan_engine(Shape.make(shape).cut(layers), "cuda", EngineSizes(
            max_model_len=length + 1, num_tokens=length + 1, memory_gib=130), H200)
        runner = runner_without_memory(engine)
        if num_ranks > 1:
            runner.use_group(Absent(0, num_ranks), engine.plan)
        ahead = keys_of(runner, compile_steps(
            engine.scheduler_config(), shares_rows=num_ranks > 1))
        for sparse in (True, False):
            steps = prompt_steps(engine, length, sparse)
            timed = keys_of(runner, steps)
            missing = {name: sorted(keys - ahead.get(name, set()))
                       for name, keys in sorted(timed.items())}
            print(json.dumps({
                "sparse": sparse, "launched": sorted(timed),
                "missing": {name: keys for name, keys in missing.items() if keys}}))


def without_memory() -> None:
    """From here on tensors without memory pass for those of a Hopper GPU."""
    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return EMPTY(*size, **options)

    patches: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta")),
        (torch, "empty", empty), (torch, "empty_like", EMPTY_LIKE),
        (torch.Tensor, "new_empty", NEW_EMPTY),
        (load_stages, "random_weights", lambda model, seed: None),
        (triton_scouts, "_on_hopper", lambda queries, k: queries.shape[2] >= 64),
        (select, "_shared_bytes", lambda device: SHARED_BYTES)]
    for owner, name, value in patches:
        setattr(owner, name, value)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(x) for x in sys.argv[3].split(",")],
         int(sys.argv[4]))
