"""The key of KV blocks: whatever they depend on makes another one, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.attention.sparsity import SparsityPlan
from longspan.config import DcaConfig, EngineConfig, ModelConfig
from longspan.engine.setup import cache_key as keys
from longspan.engine.setup.cache_key import cache_key
from tests.doubles import write_checkpoint

DCA = DcaConfig(chunk_size=640, local_size=128, original_max_position_embeddings=512)
PLAN = SparsityPlan.default(3, 4)
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, Any]:
    path = write_checkpoint(tmp_path / "model")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    config = EngineConfig(model=str(path), device="cpu", dtype="float32", kv_dir="kv")
    return {"path": path, "model": ModelConfig.from_dir(path), "config": config, "dca": DCA,
            "plan": PLAN}


def key_of(facts: dict[str, Any]) -> bytes:
    return cache_key(facts["path"], facts["model"], facts["config"], dca=facts["dca"],
                     plan=facts["plan"])


def change_config(**changes: Any) -> Change:
    return lambda facts: facts.update(config=replace(facts["config"], **changes))


def change_plan(**changes: Any) -> Change:
    return lambda facts: facts.update(plan=replace(PLAN, **changes))


def append(name: str) -> Change:
    """Change a file of the checkpoint without changing what it says."""
    def change(facts: dict[str, Any]) -> None:
        file = facts["path"] / name
        file.write_text(file.read_text() + "\n")
    return change


def flip(facts: dict[str, Any]) -> None:
    """Change one bit of the weights."""
    file = facts["path"] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("change", [
    change_config(dtype="bfloat16"), change_config(block_size=64), change_config(device="cuda"),
    change_config(weights="random"), change_config(quantization="fp8"),
    lambda facts: facts.update(dca=None),
    lambda facts: facts.update(dca=replace(DCA, local_size=256)),
    lambda facts: facts.update(model=replace(facts["model"], rope_theta=5.0)),
    lambda facts: facts.update(plan=None), change_plan(num_scouts=7),
    change_plan(tail_len=2_048), change_plan(recall_target=0.9),
    change_plan(vertical=((9,) * 4,) * 3),
    append("tokenizer.json"), append("tokenizer_config.json"), append("chat_template.jinja"),
    append("config.json"), flip])
def test_each_of_these_makes_another_key(facts: dict[str, Any], change: Change) -> None:
    before = key_of(facts)
    assert key_of(facts) == before
    change(facts)
    assert key_of(facts) != before


@pytest.mark.parametrize("name", ["__version__", "VERSION", "code_digest"])
def test_another_version_or_other_code_makes_another_key(
    facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:
    before = key_of(facts)
    monkeypatch.setattr(keys, name, (lambda: "other") if name == "code_digest" else "other")
    assert key_of(facts) != before
    monkeypatch.undo()
    monkeypatch.setattr("torch.__version__", "1.0")
    assert key_of(facts) != before


def test_what_says_nothing_about_blocks_keeps_the_key(facts: dict[str, Any]) -> None:
    before = key_of(facts)
    (facts["path"] / "README.md").write_text("a model")
    change_config(prefill_chunk_len=512, max_num_requests=3, memory_gib=1.0, num_threads=1,
                  max_model_len=2_048, kv_host_gib=1.0, kv_disk_gib=1.0)(facts)
    assert key_of(facts) == before
    moved = facts["path"].rename(facts["path"].with_name("elsewhere"))
    facts.update(path=moved, config=replace(facts["config"], model=str(moved)))
    assert key_of(facts) == before
