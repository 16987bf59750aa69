"""`longspan info` plans: for models on the hub, for other machines, and what to change."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longspan import cli
from longspan.commands import info
from longspan.commands.predict import duration, product_speed
from longspan.config import ModelConfig
from longspan.engine.device import memory
from longspan.model.weights import is_on_hub
from longspan.units import GIB
from tests.doubles import write_checkpoint
from tests.model.fake_hub import NAME, FakeHub, fake_hub

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152_064,
    "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    "rope_theta": 1e7, "max_position_embeddings": 1_010_000, "tie_word_embeddings": False,
    "hidden_act": "silu", "dual_chunk_attention_config": {
        "chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144}}
WEIGHTS = {f"model-0000{i}-of-00004.safetensors": 3_800_000_000 for i in range(1, 5)}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a laptop."""
    monkeypatch.setattr(memory, "host_memory", lambda: memory.DeviceMemory(
        total_bytes=8 * GIB, free_bytes=6 * GIB))


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    return str(folder)


def rows_of(
    monkeypatch: pytest.MonkeyPatch, model: str, length: int | None = None, **options: Any
) -> dict[str, str]:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(info, "show_table", lambda title, columns, rows: shown.append(dict(rows)))
    info.run(model, length, {"device": "cpu", **options})
    return shown[0]


def ask_in_process(hub: FakeHub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The hub's library reads where the hub is when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home),
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "longspan.cli", "info", *arguments], capture_output=True, text=True,
        check=False, env=environment)


def test_a_model_on_the_hub_is_planned_by_config_and_sizes(tmp_path: Path) -> None:
    files = {"config.json": json.dumps(QWEN_7B).encode(), "README.md": b"# Model",
             "tokenizer.json": b"{}" * 1000}
    with fake_hub(files, {**WEIGHTS, "old.bin": 10**12}) as hub:
        arguments = (NAME, "--length", "100000", "--device", "cpu", "--memory-gib", "80")
        done = ask_in_process(hub, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert re.search(r"download +15\.20 GB", done.stdout)
        assert "7,615,616,512" in done.stdout and "fits: yes" in done.stdout
        got = {line.rpartition("/")[2] for line in hub.asked if "/resolve/" in line}
        assert got == {"config.json"}  # neither weights nor tokenizer
    # gone: what is in the cache is still planned with
    done = ask_in_process(hub, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "unknown: the hub cannot be asked" in done.stdout


def test_which_names_are_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_on_hub("maker/model")
    (tmp_path / "maker" / "model").mkdir(parents=True)
    assert not any(map(is_on_hub, ("maker/model", "nano", str(tmp_path), "no such thing")))


@pytest.mark.parametrize(("gib", "device", "note"), [
    (80.0, "cpu", "not this machine, which has 8.00 GiB"), (7.0, "cpu", ""),
    (24.0, "cuda", "not this machine, which has no such GPU")])
def test_another_machines_memory_is_used_not_cut(
    monkeypatch: pytest.MonkeyPatch, large_model: str, gib: float, device: str, note: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows = rows_of(monkeypatch, large_model, 100_000, memory_gib=gib, device=device)
    assert f"of {gib:.2f} GiB usable" in rows["together"]
    assert rows["device"].endswith(f"({note})" if note else "float32")
    assert ("assumed" in rows["first token, a guess"]) is bool(note)


def test_ranks_are_told_and_what_one_of_them_needs(
    monkeypatch: pytest.MonkeyPatch, large_model: str
) -> None:
    one, rows, both = (rows_of(monkeypatch, large_model, 100_000, memory_gib=80.0, **options)
                       for options in ({}, {"context_parallel": 2},
                                       {"context_parallel": 2, "pipeline_parallel": 2}))
    assert "ranks" not in one
    assert rows["ranks"] == "2 (--cp 2); the memory is that of one"
    assert both["ranks"] == "4 (--cp 2 --pp 2); the memory is that of one"
    weights = [float(found["weights"].split()[0]) for found in (one, rows, both)]
    assert weights[0] == weights[1] > 1.5 * weights[2]


def test_no_yes_beside_a_length_beyond_the_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = str(write_checkpoint(tmp_path / "m", max_position_embeddings=2048))
    assert rows_of(monkeypatch, model, 2048)["together"].endswith("fits: yes")
    rows = rows_of(monkeypatch, model, 2049)
    assert rows["together"].endswith("fits: no, the model reads 2,048 tokens at the most")
    assert rows["so that it fits"] == "--length 2048, or a model that reads more"
    rows = rows_of(monkeypatch, model, 2049, memory_gib=0.01)
    assert "; for 2,048 tokens also " in rows["so that it fits"]


def test_what_to_change_has_been_planned(monkeypatch: pytest.MonkeyPatch, large_model: str) -> None:
    """Following each piece of advice makes it fit."""
    rows = rows_of(monkeypatch, large_model, 400_000, memory_gib=24.0)
    advice = rows["so that it fits"]
    assert "fits: no, " in rows["together"]
    assert rows["first token, a guess"] == "none, as it does not fit"
    (length,) = re.findall(r"--length (\d+)", advice)
    assert "fits: yes" in rows_of(
        monkeypatch, large_model, int(length), memory_gib=24.0)["together"]
    (gib,) = re.findall(r"or ([\d.]+) GiB of usable memory", advice)
    assert "fits: yes" in rows_of(
        monkeypatch, large_model, 400_000, memory_gib=float(gib) + 0.01)["together"]
    half = rows_of(monkeypatch, large_model, 400_000, memory_gib=24.0, dtype="bfloat16")
    assert ("still missing" in advice) is ("fits: no" in half["together"])
    tight = {"memory_gib": 20.0, "dtype": "bfloat16"}
    (gib,) = re.findall(r"--kv-dtype int8 \(([\d.]+) GiB",
                        rows_of(monkeypatch, large_model, 400_000, **tight)["so that it fits"])
    assert "fits: yes" in rows_of(monkeypatch, large_model, 400_000, kv_dtype="int8",
                                  **{**tight, "memory_gib": float(gib) + 0.01})["together"]
    little = rows_of(monkeypatch, large_model, 400_000)
    assert "a smaller model" in little["so that it fits"]
    assert "still missing" in little["so that it fits"]
    assert "--length" not in little["so that it fits"]
    assert "so that it fits" not in rows_of(monkeypatch, "nano", 1000)


def test_times_grow_with_the_length_and_are_called_guesses(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.commands.predict.product_speed", lambda *_: 1e11)
    short = rows_of(monkeypatch, "nano", 4096)["first token, a guess"]
    long = rows_of(monkeypatch, "nano", 30_000)["first token, a guess"]
    seconds = [float(re.match(r"after ([\d.]+) s \(at 100 GFLOP/s, measured here\)", text)[1])
               for text in (short, long)]
    assert seconds[1] > 7 * seconds[0] > 0
    assert product_speed("cpu", "float32") > 1e8
    assert [duration(s) for s in (1.5, 600, 9000)] == ["1.50 s", "10 min", "2.5 h"]


def test_the_claim_is_the_default_length(
    capsys: pytest.CaptureFixture[str], large_model: str
) -> None:
    assert cli.run_command(["info", large_model, "--device", "cpu"]) == 0
    assert "1,010,000 tokens" in capsys.readouterr().out
    assert ModelConfig.from_dir(Path(large_model)).num_parameters == 7_615_616_512
