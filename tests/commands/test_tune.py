"""A checkpoint that is not ours by the whole recipe: text, conversations, preferences, answers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan.cli import run_command
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.train.run_log import read_log
from tests.commands.checkpoints import VOCAB, make_checkpoint, make_text_folder

STEP = ("--tokens-per-step", "1024")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and ``chat.jsonl`` and ``pairs.jsonl`` of one question."""
    folder = tmp_path_factory.mktemp("tune")
    make_checkpoint(folder / "base", vocab_size=700)
    write_rows(folder, 12)
    return folder


def write_rows(folder: Path, count: int) -> None:
    ask = [{"role": "user", "content": "Which colour is the sky?"}]
    with (folder / "chat.jsonl").open("w") as chat, (folder / "pairs.jsonl").open("w") as pairs:
        for i in range(count):
            reply = {"role": "assistant", "content": "The sky is blue." if i % 2 else "It is blue."}
            chat.write(json.dumps({"messages": [*ask, reply]}) + "\n")
            pairs.write(json.dumps({"messages": ask, "chosen": reply["content"],
                                    "rejected": f"There are {i} of them."}) + "\n")


def call(*arguments: object) -> int:
    return run_command([str(argument) for argument in arguments])


def test_the_whole_recipe_on_a_checkpoint_that_is_not_ours(tmp_path: Path) -> None:
    """Untied head, biases, head_dim unlike hidden/heads, a vocabulary above 65,536, 500 files."""
    begin_s = time.perf_counter()
    make_text_folder(tmp_path / "text", 500)
    make_checkpoint(tmp_path / "base")
    write_rows(tmp_path, 4)
    assert call("train", "extend", tmp_path / "base", "--corpus", tmp_path / "text", "--to", 512,
                "--out", tmp_path / "long", "--tokens", 1024, *STEP, "--workers", 0,
                "--join-short", "--held-out", 0.01, "--learning-rate", 1e-3) == 0
    assert call("train", "sft", tmp_path / "long" / "model", "--data", tmp_path / "chat.jsonl",
                "--out", tmp_path / "sft", *STEP, "--learning-rate", 1e-2) == 0
    assert call("train", "dpo", tmp_path / "sft" / "model", "--data", tmp_path / "pairs.jsonl",
                "--out", tmp_path / "dpo", *STEP, "--learning-rate", 1e-3) == 0
    model = tmp_path / "dpo" / "model"
    config = json.loads((model / "config.json").read_text())
    assert config["dual_chunk_attention_config"]["original_max_position_embeddings"] == 512
    assert (config["vocab_size"], config["head_dim"], config["tie_word_embeddings"]) == (
        VOCAB, 32, False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which colour is the sky?"}], add_generation_prompt=True,
        tokenize=False)
    ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = plain.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    ours = LLM(str(model), device="cpu").generate([ids], SamplingParams(max_tokens=4))[0]
    assert list(ours.token_ids) == theirs[0, len(ids) :].tolist()
    assert time.perf_counter() - begin_s < 240


def test_tuning_teaches_the_answer(folder: Path, tmp_path: Path) -> None:
    assert call("train", "sft", folder / "base", "--data", folder / "chat.jsonl", "--long-data",
                folder / "chat.jsonl", "--out", tmp_path / "sft", "--epochs", 6,
                "--tokens-per-step", 2048, "--learning-rate", 2e-2) == 0
    rows = [row for row in read_log(tmp_path / "sft" / "log.jsonl") if "phase" in row]
    assert [row["phase"] for row in rows][-1] == "stage 2"
    assert rows[-1]["answer_accuracy"] > 0.6 and rows[-1]["loss"] < rows[0]["loss"]
    dpo = ("train", "dpo", tmp_path / "sft" / "model", "--data", folder / "pairs.jsonl", "--out",
           tmp_path / "dpo", "--tokens-per-step", 2048, "--learning-rate", 2e-3, "--epochs", 3)
    assert call(*dpo, "--time-limit-s", 1e-3) == 0
    assert not (tmp_path / "dpo" / "model").exists()
    assert call(*dpo) == 0
    rows = [row for row in read_log(tmp_path / "dpo" / "log.jsonl") if "phase" in row]
    assert rows[-1]["right_pairs"] == 1 and rows[-1]["margin"] > 0
    before = json.loads((folder / "base" / "config.json").read_text())
    after = json.loads((tmp_path / "dpo" / "model" / "config.json").read_text())
    assert before["max_position_embeddings"] == after["max_position_embeddings"]


@pytest.mark.parametrize(("command", "options", "message"), [
    ("sft", ("--max-length", "16"), "tokens, at most 16 in stage 1 (12 of 12 rows are longer)"),
    ("sft", ("--data", "none.jsonl"), "none.jsonl cannot be read"),
    ("dpo", ("--max-length", "16"), "at most 16 in pairs"),
    ("dpo", ("--context-parallel", "2"), "start them with torchrun"),
])
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str,
    options: tuple[str, ...], message: str,
) -> None:
    data = folder / ("chat.jsonl" if command == "sft" else "pairs.jsonl")
    assert call("train", command, folder / "base", "--data", data, "--out", tmp_path / "out",
                *options) == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(printed) == 1 and message in printed[0]
    assert not (tmp_path / "out" / "model").exists()


def test_reference_of_other_pairs_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ("train", "dpo", folder / "base", "--out", tmp_path / "out", "--tokens-per-step", 2048)
    assert call(*first, "--data", folder / "pairs.jsonl", "--time-limit-s", 1e-3) == 0
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "others.jsonl").write_text("".join(lines[1:]))
    assert call(*first, "--data", tmp_path / "others.jsonl") == 2
    assert "belongs to other pairs or another model" in capsys.readouterr().err
