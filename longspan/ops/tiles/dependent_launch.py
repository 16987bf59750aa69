"""Launches of kernels that begin while the one before them still runs (Hopper and later).

A kernel launched so waits by itself for the one before: what it does until then must touch nothing
that one writes, nor write what that one reads. Where the one before never says that the next may
begin, or is no kernel, the next begins when it has ended.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import CUDAOptions

ROUTER_EARLY = True
"""Whether a norm lets the router behind it begin, which asks for its own weights meanwhile; and the
way down of experts, behind which the router stands where experts alone are measured."""


@cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """Return what a launch there is given: the kernel's constant EARLY, and Triton's option."""
    is_known = "launch_pdl" in CUDAOptions.__dataclass_fields__
    if is_known and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@triton.jit
def wait_for_before(EARLY: tl.constexpr):
    """Wait until the kernel before has ended, and what it wrote can be read."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """Let the next kernel's programs begin once all of this one's have come here."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
