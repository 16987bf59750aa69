"""`longspan bench llama-cpp`: prefill and decode beside llama.cpp, taking turns in one run.

Both load once and compute the same token ids, one after the other, round by round: what else the
machine does meets both alike. llama.cpp comes as node-llama-cpp, whose package holds its build for
every kind of CPU. ``python -m longspan.bench.engine.beside JSON`` is our side.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from longspan.bench.engine.measure import passkey_prompt
from longspan.commands.console import note, show_table
from longspan.commands.results import write_rows
from longspan.cores import num_cores
from longspan.engine.device.memory import peak_memory_bytes
from longspan.errors import LongspanError
from longspan.units import GIB

OTHER = Path(__file__).with_name("beside_llama_cpp.mjs")
WARM_UP = 1_024
"""Tokens of the prompt that is not measured."""
PARTS = ("prefill_s", "decode_s", "prefill_cpu_s", "decode_cpu_s")
Answer = Callable[[Sequence[int]], dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class BesideOptions:
    """What is measured."""

    model: str
    gguf: Path
    node_dir: Path
    """Where node-llama-cpp is installed."""
    length: int
    """Prompt tokens."""
    num_answer: int
    """Tokens decoded behind the first one."""
    attention: str
    rounds: int
    threads: int | None
    quantization: str | None
    """None: what the defaults are."""


class Side:
    """One engine in a process of its own, loaded once."""

    def __init__(self, command: Sequence[str], num_answer: int, cwd: Path | None = None) -> None:
        self._num_answer, self._name = num_answer, command[0]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd)
        except FileNotFoundError:
            raise LongspanError(
                f"{command[0]} is not there; install Node.js 20 or later") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def __call__(self, ids: Sequence[int]) -> dict[str, float]:
        """Return seconds of prefill and decode, wall and processor, and the peak memory."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(
                json.dumps({"ids": list(ids), "num_answer": self._num_answer}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there is no line either
        line = self._process.stdout.readline()
        if not line:
            raise LongspanError(f"{self._name} ended with status {self._process.wait()}; its "
                                "messages are above")
        found: dict[str, float] = json.loads(line)
        return found


def run(options: BesideOptions, out: Path) -> list[dict[str, Any]]:
    """Measure, print, and write the rows. Raises `LongspanError` where a side cannot start."""
    if not options.gguf.is_file():
        raise LongspanError(f"{options.gguf}: no such file; name the model's GGUF file")
    if not (options.node_dir / "node_modules" / "node-llama-cpp").is_dir():
        raise LongspanError(f"{options.node_dir}: node-llama-cpp is not there; run "
                            "`npm i -E node-llama-cpp@3.21.1` in it")
    threads = options.threads or num_cores()
    ids = passkey_prompt(options.model, options.length)
    context = len(ids) + options.num_answer + 2
    with ExitStack() as stack:
        ours = stack.enter_context(Side(
            [sys.executable, "-m", "longspan.bench.engine.beside", json.dumps({
                "model": options.model, "attention": options.attention, "threads": threads,
                "max_model_len": context, "quantization": options.quantization})],
            options.num_answer))
        other = stack.enter_context(Side(
            ["node", str(OTHER), str(options.gguf.resolve()), str(threads), str(context)],
            options.num_answer, cwd=options.node_dir))
        rounds = take_turns({"longspan": ours, "llama.cpp": other}, ids, options.rounds)
    rows = [row_of(name, found, options, threads) for name, found in rounds.items()]
    file = write_rows(out, "beside", rows)
    _show(rows)
    note(f"rows in {file}")
    return rows


def take_turns(
    sides: dict[str, Answer], ids: Sequence[int], count: int
) -> dict[str, list[dict[str, float]]]:
    """Let the sides compute in turn: once unmeasured on another, short prompt, then ``count``
    times."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for answer in sides.values():
        answer(ids[-WARM_UP:])
    for number in range(count):
        for name, answer in sides.items():
            # neither finds a prefix of an earlier round
            found[name].append(answer([ids[number + 1], *ids[1:]]))
            note(f"round {number + 1}, {name}: prefill {found[name][-1]['prefill_s']:.2f} s, "
                 f"decode {found[name][-1]['decode_s']:.2f} s")
    return found


def row_of(
    name: str, rounds: Sequence[dict[str, float]], options: BesideOptions, threads: int,
) -> dict[str, Any]:
    """Return medians over the rounds, as tokens a second of the wall clock, with the slowest and
    the fastest round, and of processor time of all threads."""
    median = {part: statistics.median(found[part] for found in rounds) for part in PARTS}
    slowest, fastest = ({part: choose(found[part] for found in rounds) for part in PARTS}
                        for choose in (max, min))
    prefill, decode = options.length, options.num_answer
    weights = options.quantization or "default"
    return {
        "model": Path(options.model).name, "impl": name, "num_tokens": options.length,
        "attention": options.attention if name == "longspan" else "dense", "threads": threads,
        "weights": weights if name == "longspan" else options.gguf.name, "rounds": len(rounds),
        "prefill_tokens_per_s": round(prefill / median["prefill_s"], 2),
        "prefill_low": round(prefill / slowest["prefill_s"], 2),
        "prefill_high": round(prefill / fastest["prefill_s"], 2),
        "decode_tokens_per_s": round(decode / median["decode_s"], 2),
        "decode_low": round(decode / slowest["decode_s"], 2),
        "decode_high": round(decode / fastest["decode_s"], 2),
        "prefill_tokens_per_cpu_s": round(prefill / median["prefill_cpu_s"], 2),
        "decode_tokens_per_cpu_s": round(decode / median["decode_cpu_s"], 2),
        "peak_memory_gib": round(max(found["peak_memory_bytes"] for found in rounds) / GIB, 3)}


def _show(rows: Sequence[dict[str, Any]]) -> None:
    names = ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_cpu_s",
             "decode_tokens_per_cpu_s", "peak_memory_gib")
    show_table(
        f"{rows[0]['num_tokens']:,} tokens on {rows[0]['threads']} threads, tokens a second",
        ("", "prefill", "decode", "prefill, CPU time", "decode, CPU time", "peak GiB"),
        [(row["impl"], *(f"{row[name]:.2f}" for name in names)) for row in rows])
    ours, other = rows
    print("longspan over llama.cpp: " + ", ".join(
        f"{name.split('_')[0]} {ours[name] / other[name]:.2f}" for name in names[:2])
        + "; by CPU time: " + ", ".join(
        f"{name.split('_')[0]} {ours[name] / other[name]:.2f}" for name in names[2:4]))


def _serve_lines(
    *, model: str, attention: str, threads: int, max_model_len: int, quantization: str | None,
) -> None:
    """Be our side: answer each line of standard input."""
    from longspan.engine.front.llm import LLM
    from longspan.engine.request import SamplingParams, TokenEvent

    fields: dict[str, Any] = {"quantization": quantization}
    with LLM(model, device="cpu", attention=attention, num_threads=threads,
             max_model_len=max_model_len, **fields) as llm:
        for line in sys.stdin:
            asked = json.loads(line)
            params = SamplingParams(max_tokens=asked["num_answer"] + 1, ignore_eos=True)
            begun, first = _now(), None
            for event in llm.stream(asked["ids"], params):
                if first is None and isinstance(event, TokenEvent):
                    first = _now()
            assert first is not None
            end = _now()
            print(json.dumps({
                "prefill_s": first[0] - begun[0], "prefill_cpu_s": first[1] - begun[1],
                "decode_s": end[0] - first[0], "decode_cpu_s": end[1] - first[1],
                "peak_memory_bytes": peak_memory_bytes()}), flush=True)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    _serve_lines(**json.loads(sys.argv[1]))
