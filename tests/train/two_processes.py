"""Runs under torchrun: each case of tests/train/test_world.py in two processes, in a new folder."""

from __future__ import annotations

import sys
from pathlib import Path

from longspan.train.loop import run_phases
from longspan.train.world import arrange, joined_world
from tests.train.test_world import CASES, case_of

if __name__ == "__main__":
    with joined_world("cpu"):
        for name, context_parallel in CASES:
            run_phases(**case_of(name, Path(sys.argv[1]) / f"{name}-{context_parallel}"),
                       world=arrange("cpu", context_parallel))
