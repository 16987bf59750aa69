"""Exported checkpoints load in plain transformers and give the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan.errors import LongspanError
from longspan.train.export import context_facts, export_model, join_shards
from longspan.train.model import build_model, hidden_states, set_rope
from longspan.train.tokenizer import save_tokenizer, train_tokenizer

TEXT = "One of the special magic numbers for blue-cat is: 1234567.\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT] * 5, 300)
    save_tokenizer(tokenizer, directory / "tokenizer")
    model = build_model(
        vocab_size=300, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1,
        intermediate_size=96).bfloat16().float()
    set_rope(model, 1e7, 1024)
    torch.save(hidden_states(model, torch.arange(100)[None]), directory / "hidden.pt")
    export_model(
        model, directory / "tokenizer", directory / "out", rope_theta=1e7, trained_len=1024,
        max_shard_size="20KB")
    (directory / "out").rename(directory / "shards")
    join_shards(directory / "shards", directory / "out")
    return directory


def test_loads_and_gives_the_same_states(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported / "out", dtype=torch.float32)
    expected = torch.load(exported / "hidden.pt")
    with torch.no_grad():
        actual = model.model(torch.arange(100)[None]).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert model.config.use_cache is True
    ends = AutoTokenizer.from_pretrained(exported / "out").convert_tokens_to_ids(
        ["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ends


def test_config_speaks_both_dialects(exported: Path) -> None:
    config = json.loads((exported / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e7
    assert config["max_position_embeddings"] == 1_010_000 * 1024 // 262_144
    assert config["dual_chunk_attention_config"] == {
        "chunk_size": 1024, "local_size": 128, "original_max_position_embeddings": 1024}


def test_what_a_trained_length_claims() -> None:
    """Qwen2.5-1M's own numbers at its length."""
    facts = context_facts(1e7, 262_144)
    assert facts["max_position_embeddings"] == 1_010_000
    assert facts["dual_chunk_attention_config"] == {
        "chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144}
    for trained in (512, 4096, 131_072):
        dca = context_facts(1e6, trained)["dual_chunk_attention_config"]
        assert (dca["chunk_size"] - dca["local_size"]) % 128 == 0


def test_tokenizer_renders_chatml_and_splits_digits(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported / "out")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}], tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234567")["input_ids"]) == 7
    assert tokenizer.eos_token == "<|im_end|>"


def test_user_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export the model there first"):
        join_shards(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match="below 259"):
        train_tokenizer(["x"], 100)


def test_other_users_can_read_the_weights(exported: Path) -> None:
    for folder in (exported / "shards", exported / "out"):
        assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_an_incomplete_export_is_not_joined(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "shards", tmp_path / "some")
    next((tmp_path / "some").glob("model-00002*")).unlink()
    with pytest.raises(LongspanError, match="no whole export .*model-00002.* missing"):
        join_shards(tmp_path / "some", tmp_path / "out")
    assert not (tmp_path / "out").exists()
