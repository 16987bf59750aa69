"""Answers are told from the rest, by the template's marks or by difference; steps of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.errors import LongspanError
from longspan.train.chat import ChatEncoder, Samples, read_dialogues, read_pairs
from longspan.train.samples import SampleFeed, check_lengths
from longspan.train.tokenizer import CHAT_TEMPLATE, save_tokenizer, train_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}"
    "<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}")
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}<{{ m['role'] }}>"
    "{{ m['content'] }}{% endif %}{% endfor %}")
ROW = {"messages": [
    {"role": "user", "content": "Which number?"}, {"role": "assistant", "content": "It is 712."},
    {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "It is 94."}]}


def encoder(folder: Path, template: str = CHAT_TEMPLATE) -> ChatEncoder:
    save_tokenizer(train_tokenizer(["It is 712. Which number?"] * 4, 300), folder)
    (folder / "chat_template.jinja").write_text(template)
    return ChatEncoder(folder)


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def learned(samples: Samples, index: int, chat: ChatEncoder) -> str:
    ids, marks = samples.at(index)
    return str(chat.tokenizer.decode(ids[marks]))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["difference", "marks"])
def test_only_answers_are_learned(tmp_path: Path, template: str) -> None:
    chat = encoder(tmp_path / "t", template)
    samples = chat.encode(read_dialogues([write(tmp_path / "a.jsonl", ROW, ROW)]))
    assert len(samples) == 2
    assert learned(samples, 1, chat) == "It is 712.<|im_end|>It is 94.<|im_end|>"
    text = chat.tokenizer.decode(samples.at(0)[0])
    assert text.startswith("<|im_start|>user\nWhich number?<|im_end|>")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["difference", "marks"])
@pytest.mark.parametrize("prompt", ["text", "messages"])
def test_pairs_learn_the_last_answer(tmp_path: Path, template: str, prompt: str) -> None:
    asked: Any = {"prompt": "Which?"} if prompt == "text" else {"messages": [
        *ROW["messages"][:2], {"role": "user", "content": "Which?"}]}
    replies: Any = {"chosen": "It is 7.", "rejected": [
        {"role": "assistant", "content": "It is 71."}]}
    chat = encoder(tmp_path / "t", template)
    samples = chat.encode(read_pairs([write(tmp_path / "a.jsonl", asked | replies)]))
    assert [learned(samples, i, chat) for i in range(2)] == [
        "It is 7.<|im_end|>", "It is 71.<|im_end|>"]


def test_a_template_that_rewrites_the_past_is_refused(tmp_path: Path) -> None:
    chat = encoder(tmp_path / "t", FORGETFUL)
    with pytest.raises(LongspanError, match=r"a\.jsonl:1: the chat template changes earlier"):
        chat.encode(read_dialogues([write(tmp_path / "a.jsonl", ROW)]))


@pytest.mark.parametrize(("row", "message"), [
    ({"text": "x"}, ":1: messages must be a list"),
    ({"messages": []}, ":1: messages must be a list"),
    ({"messages": [{"role": "user", "content": 3}]}, ":1: messages must be a list"),
    ({"messages": [{"role": "user", "content": "x"}]}, ":1: no message of the assistant"),
    ([1], ":1: a JSON object is needed, not list"),
])
def test_bad_rows_are_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        read_dialogues([write(tmp_path / "a.jsonl", row)])


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl").write_text(json.dumps(ROW) + '\n{"messages": [')
    (tmp_path / "none.jsonl").write_text("\n")
    for name, message in (("cut", "cut.jsonl:2: no JSON"), ("none", "no row there"),
                          ("lost", "lost.jsonl cannot be read")):
        with pytest.raises(LongspanError, match=message):
            read_dialogues([tmp_path / f"{name}.jsonl"])
    same = {"prompt": "x", "chosen": "y", "rejected": "y"}
    with pytest.raises(LongspanError, match="chosen and rejected are the same"):
        read_pairs([write(tmp_path / "same.jsonl", same)])


def samples_of(lengths: list[int]) -> Samples:
    starts = np.cumsum([0, *lengths])
    marks = np.zeros(starts[-1], bool)
    marks[starts[1:] - 1] = True
    return Samples(np.arange(starts[-1], dtype=np.uint32), marks, starts)


def test_each_sample_is_seen_once_an_epoch() -> None:
    lengths = [100, 600, 512, 513, 3000, 40, 70, 1024]
    feed = SampleFeed(stages=(samples_of(lengths),), tokens_per_step=1024, identity={}, epochs=2)
    phase = feed.phase(0, "a", 1e4, 1e-3)
    assert phase.seq_len == 4096
    seen: list[int] = []
    for shape, batch in zip(feed.schedule(0, phase), feed.batches(0, phase, 0), strict=True):
        assert tuple(batch.ids.shape) == shape and shape[1] in (512, 1024, 4096)
        for row in range(shape[0]):
            count = int(batch.weights[row].sum())
            if count:
                last = int(batch.weights[row].nonzero().max())
                seen.append(int(batch.ids[row, last]))
    ends = [int(stop) - 1 for stop in np.cumsum(lengths)]
    assert sorted(seen) == sorted(2 * ends)
    later = list(feed.batches(0, phase, 3))
    assert (later[0].ids == list(feed.batches(0, phase, 0))[3].ids).all()


def test_pairs_stay_together_in_rows_of_one_length() -> None:
    feed = SampleFeed(stages=(samples_of([600, 100, 90, 80]),), tokens_per_step=2048, identity={},
                      together=2)
    assert [feed.row_length(0, group) for group in range(2)] == [1024, 512]
    for length, groups in feed.plan(0):
        batch = feed.batch(0, length, groups)
        first = int(feed.stages[0].starts[2 * groups[0]])
        assert batch.ids[0, 0] == first and len(batch.ids) % 2 == 0


def test_rows_that_are_too_long_are_named() -> None:
    with pytest.raises(LongspanError, match=r"b: 40 tokens, at most 30 in stage 1 \(2 of 3"):
        check_lengths(samples_of([10, 40, 50]), ["a", "b", "c"], 30, "stage 1")
