"""`longspan info` says what the engine does."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from longspan.commands import info, predict
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.errors import NotEnoughMemoryError
from longspan.model.weights import resolve_checkpoint
from longspan.units import GIB
from tests.doubles import write_checkpoint

GRID = [
    *product((0.001, 0.05, 0.63, 0.8, 1.0, 1.5, 1.76, 1.85, 2.1, 2.27, 2.6, 4.0),
             ("rope", "dca", "dca+yarn"), (100, 1_001, 65_536, 65_792, 262_145)),
    # what info once got wrong
    (1.85, "rope", 65_536), (2.1, "rope", 65_792),
]


def rows_of(
    monkeypatch: pytest.MonkeyPatch, length: int | None, model: str | Path = "nano",
    **options: Any,
) -> dict[str, str]:
    """The table that info prints about a model."""
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(info, "show_table", lambda title, columns, rows: shown.append(dict(rows)))
    info.run(str(model), length, options)
    return shown[0]


def gib(text: str) -> float:
    return float(re.search(r"([\d.]+) GiB", text)[1])


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budgets of the grid, whatever this machine has; its speed is measured by one product."""
    from longspan.engine.device import memory

    monkeypatch.setattr(predict, "MEASURE_S", 0.0)
    monkeypatch.setattr(memory, "host_memory", lambda: memory.DeviceMemory(
        total_bytes=64 * GIB, free_bytes=64 * GIB))


@pytest.mark.parametrize(("budget", "positions", "length"), GRID)
def test_the_verdict_is_the_engines(
    monkeypatch: pytest.MonkeyPatch, budget: float, positions: Any, length: int,
) -> None:
    options: dict[str, Any] = {"device": "cpu", "positions": positions, "memory_gib": budget}
    rows = rows_of(monkeypatch, length, **options)
    try:
        memory = ResolvedEngine.resolve(EngineConfig(
            model="nano", max_model_len=length, **options)).memory
    except NotEnoughMemoryError as error:
        assert "fits: no, " in rows["together"]
        needed = gib(str(error).split("needs")[1])
    else:
        assert rows["together"].endswith("fits: yes")
        needed = (memory.weights_bytes + memory.workspace_bytes
                  + -(-length // 128) * 128 * memory.kv_bytes_per_token) / GIB
    assert gib(rows["together"]) == pytest.approx(needed, abs=0.005)
    parts = [gib(rows[name]) for name in ("weights", "KV cache", "workspace")]
    assert sum(parts) == pytest.approx(gib(rows["together"]), abs=0.02)
    assert ("fits: yes" in rows["together"]) is (gib(rows["together"].split(" of ")[0]) <= budget)


@pytest.mark.parametrize(("quantization", "words"), [
    (None, ""), ("fp8", " (fp8, a scale for each row)"), ("int4", " (int4 in groups)")])
def test_weights_are_of_their_form(
    monkeypatch: pytest.MonkeyPatch, quantization: str | None, words: str,
) -> None:
    rows = rows_of(monkeypatch, 1000, device="cpu", quantization=quantization)
    assert rows["weights"].endswith(f" GiB{words}")


@pytest.mark.parametrize("budget", [0.6, 0.8, 1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("positions", ["rope", "dca"])
def test_the_longest_prompt_is_what_the_engine_accepts(
    monkeypatch: pytest.MonkeyPatch, budget: float, positions: Any,
) -> None:
    options: dict[str, Any] = {"device": "cpu", "positions": positions, "memory_gib": budget}
    told = {rows_of(monkeypatch, length, **options)["longest prompt here"]
            for length in (100, 65_536, None)}
    (text,) = told
    longest = int(text.removesuffix(" tokens").replace(",", ""))

    def resolve(length: int | None) -> ResolvedEngine:
        return ResolvedEngine.resolve(EngineConfig(model="nano", max_model_len=length, **options))

    claim = ModelConfig.from_dir(resolve_checkpoint("nano")).max_position_embeddings
    if longest < claim:
        with pytest.raises(NotEnoughMemoryError):
            resolve(longest + 128)
    if longest:
        assert resolve(longest).memory.max_model_len == longest
        # unasked it keeps steps that are not slow
        assert 0.6 * longest < resolve(None).memory.max_model_len <= longest
    if 0 < longest < 1_010_000:
        with pytest.raises(NotEnoughMemoryError, match=f"lower max_model_len to {longest}"):
            ResolvedEngine.resolve(
                EngineConfig(model="nano", max_model_len=longest + 128, **options))


def test_a_plan_that_need_not_fit_says_what_is_missing() -> None:
    config = EngineConfig(model="nano", device="cpu", memory_gib=0.5, max_model_len=65_536)
    short = ResolvedEngine.resolve(config, must_fit=False).memory
    assert short.max_model_len == 65_536 and short.num_blocks == 512
    assert short.missing_bytes == short.needed_bytes - short.budget_bytes > 0
    enough = EngineConfig(model="nano", device="cpu", max_model_len=65_536,
                          memory_gib=short.needed_bytes / GIB)
    assert ResolvedEngine.resolve(enough).memory.missing_bytes == 0
    less = EngineConfig(model="nano", device="cpu", max_model_len=65_536,
                        memory_gib=(short.needed_bytes - 1) / GIB)
    with pytest.raises(NotEnoughMemoryError):
        ResolvedEngine.resolve(less)


def test_longer_contexts_of_one_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    """By its config_1m.json, or by DCA that is derived from its window."""
    path = write_checkpoint(tmp_path)

    def rows(length: int | None = None, positions: str = "auto") -> dict[str, str]:
        return rows_of(monkeypatch, length, path, device="cpu", positions=positions, memory_gib=4.0)

    assert rows()["positions"] == "rope"
    assert rows(positions="dca")["positions"] == (
        "dca (as plain RoPE up to 3,968 tokens; chunk_size 4,096, local_size 128)")
    assert rows(positions="dca")["longest context claimed"] == "16,384 tokens"
    raw = json.loads((path / "config.json").read_text())
    (path / "config_1m.json").write_text(json.dumps(raw | {
        "max_position_embeddings": 40_000, "dual_chunk_attention_config": {
            "chunk_size": 2_048, "local_size": 128, "original_max_position_embeddings": 2_048}}))
    assert rows()["positions"] == "rope (config_1m.json is read for more than 4,096)"
    assert rows(5_000)["longest context claimed"] == "40,000 tokens"
    assert rows(5_000)["positions"].startswith("dca+yarn (as plain RoPE up to 1,920 tokens")
