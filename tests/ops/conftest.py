"""Triton kernels in tests: interpreted on CPU tensors, compiled on CUDA tensors.

A test of a kernel takes the fixture ``kernel_device`` and puts its tensors there. It runs under
Triton's interpreter everywhere, CI included, and with ``-m gpu`` compiled on the GPU. One process
does one or the other: what ``triton.jit`` makes is settled when the kernels' module is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.ops import interpreter

FOLDER = Path(__file__).parent
# Triton exists for Linux only; elsewhere the files that test kernels are not even imported.
collect_ignore = [] if sys.platform == "linux" else [
    str(file.relative_to(FOLDER)) for file in FOLDER.rglob("test_*.py")
    if "kernel_device" in file.read_text(encoding="utf-8")]


@pytest.fixture(params=[
    pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Device of a kernel's tensors."""
    import triton

    is_interpreted = triton.knobs.runtime.interpret
    assert is_interpreted is (request.param == "cpu"), (
        "kernels are interpreted or compiled, one in a process: select GPU tests by `-m gpu`")
    if is_interpreted:
        interpreter.repair(monkeypatch)
    with np.errstate(all="ignore"):  # kernels may compute what they then mask
        yield str(request.param)
