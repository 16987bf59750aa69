"""A prompt launches no variant of a kernel that was not compiled before it came."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("shape", "length", "num_ranks"), [
    ("qwen2.5-7b", 1_000_000, 1), ("qwen3-30b-a3b", 520_001, 1), ("qwen2.5-7b", 131_072, 2),
    ("qwen2.5-7b", 262_048, 1)])
def test_a_prompt_compiles_nothing(shape: str, length: int, num_ranks: int) -> None:
    """With a stride of 253,952 and of 126,976, a length that is a multiple of nothing, ranks that
    do not share the tail's rows, and 32 dense rows behind blocks whose number 16 divides."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.launch_keys", shape, "4", str(length), str(num_ranks)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["sparse"] for row in found] == [True, False]
    assert [row["missing"] for row in found] == [{}, {}]
    sparse, dense = (set(row["launched"]) for row in found)
    assert {"_scout_kernel", "_sparse_kernel", "lower_bounds", "_rms_norm", "sum_masses"} <= sparse
    assert {"_dense_kernel", "_rows_kernel", "_rms_norm"} <= dense
