"""The recipe of nano: what its phases share with the report, and the whole chain on a toy."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from longspan.cli import run_command
from longspan.commands import train as commands
from longspan.commands import training
from longspan.data.tokens import Kind
from longspan.recipes import find_extension, nano
from longspan.train.phases import Phase, validate_phases
from longspan.train.run_log import read_log
from tests.train.conftest import LINE, TOKENS, train_toy

RECALL, *PHASES = nano.nano().phases


def test_lengths_double_up_to_the_longest() -> None:
    lengths = [phase.seq_len for phase in PHASES]
    assert lengths[0] == 4096 and lengths[-1] == 262_144
    assert all(longer == 2 * length for length, longer in itertools.pairwise(lengths[1:]))
    assert {p.tokens_per_step for p in PHASES[1:]} == {lengths[-1]}, "a step has one longest row"
    validate_phases([RECALL, *PHASES])


def test_recall_comes_first_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of a phase with tasks of its own are theirs; those of the others are the mixture's."""
    assert (RECALL.seq_len, RECALL.rope_theta) == (PHASES[0].seq_len, PHASES[0].rope_theta)
    assert RECALL.tasks == {"recall": 1} and not any(phase.tasks for phase in PHASES)
    monkeypatch.setattr(training, "open_source", lambda *_: None)
    mixture = nano.nano().rules.mixture
    for phase in (RECALL, PHASES[0]):
        rows = training.open_rows(tmp_path, mixture, True, phase)
        assert isinstance(rows, partial)
        assert rows.keywords["mixture"].weights == (phase.tasks or mixture.weights)


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
    # of small steps more are taken, so a rate counts by the root of their tokens
    rates = [phase.learning_rate / phase.tokens_per_step ** 0.5 for phase in PHASES]
    assert rates == sorted(set(rates), reverse=True)
    weights = nano.nano().kind_weights
    assert weights[Kind.PLANTED] == 0 and weights[Kind.ANSWER] > weights[Kind.COPY] > 1


def test_each_phase_leaves_a_checkpoint_that_can_be_judged(done: Path) -> None:
    """With its own RoPE base and trained length; the last one is the result of the phases."""
    phases = done / "pretrain" / "phases"
    assert sorted(p.name for p in phases.iterdir()) == ["a", "b"]
    for phase in nano.smoke().phases:
        config = json.loads((phases / phase.name / "config.json").read_text())
        assert config["rope_theta"] == phase.rope_theta
        assert config["dual_chunk_attention_config"]["chunk_size"] == phase.seq_len
    last = (phases / "b" / "model.safetensors").read_bytes()
    assert last == (done / "pretrain" / "model" / "model.safetensors").read_bytes()
    assert last != (phases / "a" / "model.safetensors").read_bytes()


def test_each_gate_is_at_a_trained_length() -> None:
    for recipe in (nano.nano(), nano.smoke()):
        lengths = [phase.seq_len for phase in recipe.phases]
        assert set(recipe.gate_lengths) <= set(lengths)
        assert recipe.gate_lengths[-1] == lengths[-1]


def test_everything_from_text_to_model(done: Path, tmp_path: Path) -> None:
    """Corpus, phases, conversations, fine-tuning, pairs, preferences."""
    file = tmp_path / "train.cpu.json"
    assert run_command(["train", "results", str(done / "pretrain" / "log.jsonl"), str(file),
                        "--model", "toy", "--command", "c"]) == 0
    first, last = json.loads(file.read_text())["rows"]
    assert [first["num_tokens_trained"], last["num_tokens_trained"]] == [2048, 1024]
    assert 0 < last["loss"] < math.log(600) + 0.5 and first["tokens_per_s"] > 0
    assert first["gate"].keys() == {"num_tokens", "gate_s", *(
        f"{asked}_{what}256" for asked in ("needles", "number_first")
        for what in ("", "n_", "digits_"))}
    assert (last["gate"]["needles_n_256"], last["gate"]["number_first_n_512"]) == (4, 4)
    base = done / "pretrain" / "model"
    config = json.loads((base / "config.json").read_text())
    assert (config["rope_theta"], config["vocab_size"]) == (1e6, 600)
    assert config["dual_chunk_attention_config"]["chunk_size"] == 512
    trained = torch.load(done / "pretrain" / "state.pt", weights_only=True)["model"]
    exported = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    assert exported.keys() == trained.keys()
    assert all((exported[name] == trained[name].bfloat16()).all() for name in trained)
    assert json.loads((done / "model" / "config.json").read_text()) == config
    practised = read_log(done / "practice" / "log.jsonl")
    assert [row["phase"] for row in practised if "phase" in row][-1] == "practice"
    gates = [row["held_out_bits_per_byte"] for row in practised if "gate" in row]
    assert len(gates) == 2 and all(0 < bits < 20 for bits in gates), "before and after"
    assert [row["number_first_n_1024"] for row in practised if "number_first_1024" in row] == [4]
    stages = [row["phase"] for row in read_log(done / "sft" / "log.jsonl") if "phase" in row]
    assert list(dict.fromkeys(stages)) == ["stage 1", "stage 2"]
    pairs = [row for row in read_log(done / "dpo" / "log.jsonl") if "phase" in row]
    assert pairs[-1]["phase"] == "dpo" and 0 < pairs[-1]["loss"] < 1
    tokenizer = Tokenizer.from_file(str(done / "model" / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(LINE).ids) == LINE
    final, before = (AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32).state_dict() for path in (done / "model", base))
    assert any((final[name] != before[name]).any() for name in final)


def test_what_is_done_is_not_done_again(done: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in done.rglob("state.pt")}
    assert len(files) == 4
    assert train_toy("--root", f"{done.parent / 'text'}=1", "--out", done, *TOKENS) == 0
    assert files == {path: path.stat().st_mtime_ns for path in done.rglob("state.pt")}


def test_other_text_is_refused(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_toy("--root", f"{done.parent / 'text'}=2", "--out", done, *TOKENS) == 2
    assert "was made from other text" in capsys.readouterr().err


def test_a_base_takes_the_place_of_the_phases(done: Path, tmp_path: Path) -> None:
    """As where pre-training ran on another machine."""
    out = tmp_path / "run"
    assert train_toy("--root", f"{done.parent / 'text'}=1", "--out", out, "--until", "corpus") == 0
    base = done / "pretrain" / "model"
    assert train_toy("--out", out, "--until", "pretrain", "--base", base) == 0
    assert not (out / "pretrain" / "state.pt").exists()
    assert (out / "model" / "model.safetensors").read_bytes() == (
        done / "pretrain" / "model" / "model.safetensors").read_bytes()


def test_pieces_go_on_where_the_texts_are_not(done: Path, tmp_path: Path) -> None:
    """Corpus and tokenizer travel to the machine that fine-tunes, raw texts stay behind; shards
    come back."""
    out, shards = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(done / "data", out / "data")
    base = ("--base", done / "pretrain" / "model")
    assert train_toy("--out", out, *base, "--until", "sft", "--tokens", "practice=0.005",
                "--shards", shards) == 0
    practised = [row for row in read_log(out / "practice" / "log.jsonl") if "phase" in row]
    assert practised[-1]["num_tokens"] == 4096, "two steps instead of the recipe's four"
    assert run_command(["train", "join", str(shards), str(tmp_path / "joined")]) == 0
    assert (tmp_path / "joined" / "model.safetensors").read_bytes() == (
        out / "sft" / "model" / "model.safetensors").read_bytes()
    assert train_toy("--out", out, "--until", "dpo") == 0
    assert (out / "dpo" / "model" / "config.json").is_file()


def test_workers_make_the_same_run(done: Path, tmp_path: Path) -> None:
    """Two processes that make rows give the losses of none."""
    shutil.copytree(done / "data", tmp_path / "data")
    assert train_toy("--out", tmp_path, "--until", "pretrain", "--workers", 2, *TOKENS) == 0
    losses = [[row["loss"] for row in read_log(folder / "pretrain" / "log.jsonl") if "loss" in row]
              for folder in (done, tmp_path)]
    assert losses[0] == losses[1]


def test_a_run_that_ends_between_phases_exports_the_first(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards say what the weights were trained with, not what would have come next."""
    shards = tmp_path / "shards"
    shutil.copytree(done / "data", tmp_path / "run" / "data")

    def gate(*_: object) -> dict[str, object]:
        signal.raise_signal(signal.SIGTERM)
        return {}

    monkeypatch.setattr(commands, "run_gate", gate)
    assert train_toy("--out", tmp_path / "run", *TOKENS, "--shards", shards) == 0
    assert not (tmp_path / "run" / "model").exists()
    assert run_command(["train", "join", str(shards), str(tmp_path / "joined")]) == 0
    for folder in (shards, tmp_path / "joined"):
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == 1e4, folder
        assert config["dual_chunk_attention_config"]["chunk_size"] == 256, folder
    assert (tmp_path / "joined" / "model.safetensors").is_file()


@pytest.mark.parametrize(("arguments", "message"), [
    (("--tokens", "c=1"), "no phase named c: choose from a, b"),
    (("--tokens", "a"), "--tokens a: write NAME=NUMBER"),
    (("--tokens", "a=x"), "--tokens a=x: write NAME=NUMBER"),
    (("--tokens", "a=0.0001"), "phase a: 100 tokens is less than one step"),
    (("--until", "x"), "--until x: choose from corpus, pretrain, practice, sft, dpo"),
    (("--base", "none"), "none is no checkpoint"),
])
def test_what_a_person_can_mend_is_one_line(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...],
    message: str,
) -> None:
    shutil.copytree(done / "data", tmp_path / "data")
    assert train_toy("--out", tmp_path, *arguments) == 2
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
    assert train_toy("--root", root.format(folder=tmp_path), "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed


@pytest.mark.parametrize("name", ["qwen2.5-7b-1m", "qwen2.5-14b-1m"])
def test_the_reports_models_at_their_real_scale(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report's lengths and bases; they fit GPUs of 80 GiB, and do not fit one."""
    phases = find_extension(name).phases
    assert [(phase.seq_len, phase.rope_theta) for phase in phases] == [
        (32_768, 1e6), (65_536, 1e6), (131_072, 5e6), (262_144, 1e7)]
    assert [phase.full_share for phase in phases] == [1.0, 0.75, 0.75, 0.75]
    validate_phases(phases)
    assert run_command(["train", "plan", name]) == 0
    printed = capsys.readouterr().out
    assert "262,144" in printed and "days" in printed and "recomputed" in printed
    assert run_command(["train", "plan", name, "--gpus", "1", "--context-parallel", "1"]) == 2
    assert "GiB on each of 1 processes, 80.0 GiB are there" in capsys.readouterr().err
    assert run_command(["train", "plan", name, "--gpus", "48"]) == 2
    assert "rows a step cannot be divided over 48 GPUs" in capsys.readouterr().err


def test_a_single_document_is_refused_with_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """nano's command has no option for the share that is set aside."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n".join(
        f"Line {i} of a plain text has {i * i} words to say of nothing much." for i in range(200)))
    assert run_command(["train", "nano", "--smoke", "--root", f"{tmp_path / 'text'}=1",
                        "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "one document alone" in said and "first two folders" in said
    assert "--held-out" not in said
