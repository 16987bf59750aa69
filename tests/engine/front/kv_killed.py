"""Kills engines while they compute, write and read KV, and asks the next one. Run by a test.

Arguments: checkpoint, folder, number of kills, seed. Torch is loaded once; each engine is a fork.
Prints how many documents each engine found on disk, and fails when an answer is another one.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.units import GIB
from tests.forks import forked

LENGTH, NUM_DOCUMENTS = 2_400, 4
DISK_BYTES = 4_000_000
"""Three documents of 1.2 MB: the oldest files go while others are written."""
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "max_model_len": LENGTH + 64, "block_size": 16, "prefill_chunk_len": 256, "device": "cpu",
    "num_threads": 1}


def ask(llm: LLM, seed: int) -> tuple[tuple[int, ...], int]:
    """A document's answer, and how many of its tokens were found."""
    rng = random.Random(seed)
    output = llm.generate([rng.randrange(200) for _ in range(LENGTH)], GREEDY)[0]
    return output.token_ids, output.num_cached_tokens


def use(checkpoint: str, folder: str, told: int) -> None:
    """Ask until killed."""
    with LLM(checkpoint, kv_dir=folder, kv_disk_gib=DISK_BYTES / GIB, **OPTIONS) as llm:
        os.write(told, b".")
        while True:
            for seed in range(NUM_DOCUMENTS):
                ask(llm, seed)


def compare(checkpoint: str, folder: str, answers: Path, first: int) -> None:
    """Ask an engine that has been started behind a kill; the first document of all but one."""
    options = {} if not folder else {"kv_dir": folder, "kv_disk_gib": DISK_BYTES / GIB}
    with LLM(checkpoint, **OPTIONS, **options) as llm:
        asked = [first, (first + 1) % NUM_DOCUMENTS] if folder else range(NUM_DOCUMENTS)
        found = {seed: ask(llm, seed) for seed in asked}
    if not folder:
        answers.write_text(repr({seed: tokens for seed, (tokens, _) in found.items()}))
        return
    known = eval(answers.read_text())
    assert all(tokens == known[seed] for seed, (tokens, _) in found.items()), (found, known)
    print(sum(num_cached > 0 for _, num_cached in found.values()), flush=True)


def main() -> None:
    """Kill, ask, again and again."""
    checkpoint, folder, times, rng = (
        sys.argv[1], sys.argv[2], int(sys.argv[3]), random.Random(int(sys.argv[4])))
    answers, num_parts = Path(folder).with_suffix(".answers"), 0

    def run(work: Callable[[], None]) -> None:
        _, status = os.waitpid(forked(work), 0)
        assert status == 0, status

    run(lambda: compare(checkpoint, "", answers, 0))
    for turn in range(times):
        told, done = os.pipe()
        pid = forked(lambda done=done: use(checkpoint, folder, done))  # type: ignore[misc]
        os.read(told, 1)
        time.sleep(rng.uniform(0.0, 1.0))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
        os.close(done)
        num_parts += bool(list(Path(folder).glob("*.part")))
        run(lambda turn=turn: compare(  # type: ignore[misc]
            checkpoint, folder, answers, turn % NUM_DOCUMENTS))
        used = sum(file.stat().st_size for file in Path(folder).glob("*-*"))
        assert used <= DISK_BYTES and not list(Path(folder).glob("*.part")), used
    print("killed while writing:", num_parts)


if __name__ == "__main__":
    main()
