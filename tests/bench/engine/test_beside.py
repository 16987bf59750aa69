"""Measuring beside llama.cpp: turns, medians, and what a person can get wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.bench.engine import beside
from longspan.bench.engine.beside import BesideOptions, Side, row_of, take_turns
from longspan.errors import LongspanError
from tests.doubles import write_checkpoint

OPTIONS = BesideOptions(
    model="dir/m", gguf=Path("m.gguf"), node_dir=Path("."), length=100, num_answer=4,
    attention="auto", rounds=3, threads=1, quantization=None)


def test_sides_take_turns_and_never_see_a_prompt_twice() -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def side(name: str) -> beside.Answer:
        def answer(ids: Sequence[int]) -> dict[str, float]:
            asked.append((name, tuple(ids)))
            return dict.fromkeys(beside.PARTS, 1.0)
        return answer

    found = take_turns({"a": side("a"), "b": side("b")}, range(100, 200), 3)
    assert [name for name, _ in asked] == ["a", "b"] * 4
    assert len({ids for _, ids in asked}) == 4 and {len(ids) for _, ids in asked[2:]} == {100}
    assert len({ids[0] for _, ids in asked}) == 4, "no two begin alike"
    assert all(len(rounds) == 3 for rounds in found.values())


def test_rows_hold_medians() -> None:
    rounds = [{"prefill_s": s, "decode_s": 2 * s, "prefill_cpu_s": 4 * s, "decode_cpu_s": 8 * s,
               "peak_memory_bytes": s * 2**30} for s in (0.5, 90.0, 1.0)]
    row = row_of("longspan", rounds, OPTIONS, 1)
    assert (row["prefill_tokens_per_s"], row["decode_tokens_per_s"]) == (100, 2)
    assert (row["prefill_tokens_per_cpu_s"], row["decode_tokens_per_cpu_s"]) == (25, 0.5)
    assert (row["decode_low"], row["decode_high"]) == (round(4 / 180, 2), 4)
    assert row["prefill_low"] < row["prefill_tokens_per_s"] < row["prefill_high"] == 200
    assert (row["weights"], row["peak_memory_gib"], row["model"]) == ("default", 90, "m")
    other = row_of("llama.cpp", rounds, OPTIONS, 1)
    assert (other["weights"], other["attention"]) == ("m.gguf", "dense")


def test_our_side_answers_lines(tmp_path: Path) -> None:
    """The real process, on a small checkpoint: twice, and times that add up."""
    write_checkpoint(tmp_path)
    with Side([sys.executable, "-m", "longspan.bench.engine.beside", json.dumps({
            "model": str(tmp_path), "attention": "auto", "threads": 1, "max_model_len": 64,
            "quantization": "int8"})], 3) as side:
        for ids in (range(1, 40), range(2, 41)):
            found = side(ids)
            assert all(0 < found[part] < 60 for part in beside.PARTS)
            assert found["peak_memory_bytes"] > 2**26


def test_a_side_that_ends_is_one_line() -> None:
    with Side([sys.executable, "-c", "raise SystemExit(3)"], 3) as side, \
            pytest.raises(LongspanError, match="ended with status 3"):
        side([1, 2])
    with pytest.raises(LongspanError, match="install Node.js"):
        Side(["no-such-program"], 3)


def test_what_is_missing_is_said_before_anything_loads(tmp_path: Path) -> None:
    options = replace(OPTIONS, node_dir=tmp_path, gguf=tmp_path / "m.gguf")
    with pytest.raises(LongspanError, match="name the model's GGUF file"):
        beside.run(options, tmp_path)
    options.gguf.touch()
    with pytest.raises(LongspanError, match="npm i -E node-llama-cpp"):
        beside.run(options, tmp_path)
