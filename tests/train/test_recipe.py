"""The recipe of nano: what its phases share with the report, and the whole chain on a toy."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from longspan.commands import train as commands
from longspan.data.tokens import Kind
from longspan.train.phases import Phase, validate_phases
from recipes import nano

LINE = "The quick brown fox number {} jumps over the lazy dog and runs home.\n"
PHASES = nano.nano().phases


def make_text_files(folder: Path) -> None:
    for i in range(120):
        (folder / f"p{i % 6}").mkdir(parents=True, exist_ok=True)
        body = "".join(LINE.format(i * 1000 + j) for j in range(60))
        (folder / f"p{i % 6}" / f"f{i}.txt").write_text(body)


def call(*arguments: object) -> int:
    """Exit status of a command of the recipe, with a vocabulary that little text fills."""
    toy = replace(nano.smoke(), vocab_size=600)
    return commands.run_recipe([str(a) for a in arguments], nano.nano(), toy, nano.RULES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    make_text_files(folder / "text")
    assert call("corpus", "--smoke", "--root", f"{folder / 'text'}=1", "--out", folder) == 0
    return folder


def test_lengths_double_up_to_the_longest() -> None:
    lengths = [phase.seq_len for phase in PHASES]
    assert lengths[0] == 4096 and lengths[-1] == 262_144
    assert all(longer == 2 * length for length, longer in itertools.pairwise(lengths[1:]))
    assert {p.tokens_per_step for p in PHASES} == {lengths[-1]}, "a step has one longest row"
    validate_phases(PHASES)


def test_rope_bases_grow_with_the_length() -> None:
    """Even the slowest dimension but one turns less than a quarter over the longest row."""
    bases = [phase.rope_theta for phase in PHASES]
    assert bases == sorted(bases) and bases[-1] == 1000 * bases[0]
    head_dim = 128
    for phase in PHASES:
        wavelength = 2 * math.pi * phase.rope_theta ** (1 - 2 / head_dim)
        assert phase.seq_len < wavelength / 4


@pytest.mark.parametrize("phase", PHASES, ids=[p.name for p in PHASES])
def test_three_quarters_of_the_sequences_are_full(phase: Phase) -> None:
    """From the third phase on, and to within one step; the others mix no lengths."""
    sequences: Counter[int] = Counter()
    for rows, length in phase.schedule():
        sequences[length] += rows
    is_mixed = PHASES.index(phase) >= 2
    step = max(Counter(dict((length, rows) for rows, length in phase.schedule())).values())
    expected = (0.75 if is_mixed else 1.0) * sequences.total()
    assert abs(sequences[phase.seq_len] - expected) <= step / 2 + 0.5
    shorter = {p.seq_len for p in PHASES[1 : PHASES.index(phase)]}
    assert set(sequences) == {phase.seq_len} | (shorter if is_mixed else set())


def test_rates_fall_and_what_is_random_is_not_learnt() -> None:
    rates = [phase.learning_rate for phase in PHASES]
    assert rates == sorted(set(rates), reverse=True)
    weights = nano.nano().kind_weights
    assert weights[Kind.PLANTED] == 0 and weights[Kind.ANSWER] > weights[Kind.COPY] > 1


def test_each_gate_is_at_a_trained_length() -> None:
    for recipe in (nano.nano(), nano.smoke()):
        lengths = [phase.seq_len for phase in recipe.phases]
        assert set(recipe.gate_lengths) <= set(lengths)
        assert recipe.gate_lengths[-1] == lengths[-1]


def test_chain_from_text_files_to_checkpoint(data: Path, tmp_path: Path) -> None:
    out, model_dir, file = tmp_path / "run", tmp_path / "model", tmp_path / "train.cpu.json"
    common = ("--smoke", "--data", data, "--out", out)
    tokens = ("--tokens", "a=0.003", "--tokens", "b=0.002")
    assert call("train", *common, "--workers", 0, *tokens) == 0
    assert call("export", *common, "--model-dir", model_dir) == 0
    assert call("results", "--log", out / "log.jsonl", "--file", file) == 0
    first, last = json.loads(file.read_text())["rows"]
    assert [first["num_tokens_trained"], last["num_tokens_trained"]] == [2048, 1024]
    assert 0 < last["loss"] < math.log(600) + 0.5 and first["tokens_per_s"] > 0
    assert first["gate"].keys() == {
        "num_tokens", "exact_256", "digits_256", "n_256", "gate_s"}
    assert (last["gate"]["n_256"], last["gate"]["n_512"]) == (4, 4)
    config = json.loads((model_dir / "config.json").read_text())
    assert (config["rope_theta"], config["vocab_size"]) == (1e6, 600)
    assert config["dual_chunk_attention_config"]["chunk_size"] == 512
    trained = torch.load(out / "state.pt", weights_only=True)["model"]
    exported = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).state_dict()
    assert exported.keys() == trained.keys()
    assert all((exported[name] == trained[name].bfloat16()).all() for name in trained)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.decode(tokenizer.encode(LINE).ids) == LINE


def test_workers_make_the_same_run(data: Path, tmp_path: Path) -> None:
    losses = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        assert call("train", "--smoke", "--data", data, "--out", out, "--workers", workers,
                    "--tokens", "a=0.003", "--tokens", "b=0.002") == 0
        rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[1]


def test_a_run_that_ends_between_phases_exports_the_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config and shards say what the weights were trained with, not what would have come next."""
    out, shards = tmp_path / "run", tmp_path / "shards"

    def gate(*_: object) -> dict[str, object]:
        signal.raise_signal(signal.SIGTERM)
        return {}

    monkeypatch.setattr(commands, "run_gate", gate)
    common = ("--smoke", "--data", data, "--out", out)
    assert call("train", *common, "--workers", 0, "--tokens", "a=0.002", "--shards", shards) == 0
    assert call("export", *common, "--model-dir", tmp_path / "state") == 0
    assert call("export", *common, "--shards", shards, "--model-dir", tmp_path / "joined") == 0
    for folder in (shards, tmp_path / "state", tmp_path / "joined"):
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == 1e4, folder
        assert config["dual_chunk_attention_config"]["chunk_size"] == 256, folder
    assert (tmp_path / "joined" / "model.safetensors").is_file()


@pytest.mark.parametrize(("arguments", "message"), [
    (("train", "--smoke", "--tokens", "c=1"), "no phase named c: choose from a, b"),
    (("train", "--smoke", "--tokens", "a"), "--tokens a: write NAME=NUMBER"),
    (("train", "--smoke", "--tokens", "a=x"), "--tokens a=x: write NAME=NUMBER"),
    (("train", "--smoke", "--tokens", "a=0.0001"), "phase a: 100 tokens is less than one step"),
    (("train", "--smoke", "--resume"), "nothing to resume"),
    (("train",), "has 600 tokens, recipe nano 4,096: make the corpus with the same recipe"),
    (("export", "--smoke", "--model-dir", "x"), "nothing to resume or export"),
    (("export", "--model-dir", "x", "--shards", "none"), "none is no whole export"),
])
def test_what_a_person_can_mend_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...],
    message: str,
) -> None:
    assert call(*arguments, "--data", data, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err and printed.out == ""


@pytest.mark.parametrize(("root", "message"), [
    ("{folder}", "write NAME=NUMBER"),
    ("{folder}=-1", "write NAME=NUMBER"),
    ("{folder}/none=1", "is no file or folder"),
    ("{folder}/empty=1", "no text that can be used"),
])
def test_roots_that_give_nothing_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], root: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert call("corpus", "--root", root.format(folder=tmp_path), "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed
