"""The demonstration on a tiny model that knows nothing, and on one that reads the prompt."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longspan import cli
from longspan.commands import demo
from longspan.documents.gather import Document, as_prompt
from longspan.engine.recall import Recall
from longspan.engine.request import Progress, RequestOutput, TokenEvent
from longspan.engine.text.tokenizer import Tokenizer
from longspan.eval.text import python_text_roots
from tests.doubles import write_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=8192))


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small package of the standard library instead of all of it."""
    roots = [root / "json" for root in python_text_roots()]
    monkeypatch.setattr(demo, "python_text_roots", lambda: roots)


class ReadingModel:
    """Stands in for `LLM`: looks the answer up in the prompt."""

    def __init__(self, model: str, **options: Any) -> None:
        self.tokenizer = Tokenizer(Path(model))
        self.config = SimpleNamespace(device="cpu")
        assert options["max_num_requests"] == 1, "a GPU's KV pool is sized by it"

    def __enter__(self) -> ReadingModel:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stats(self) -> Any:
        return SimpleNamespace(peak_memory_bytes=2**30)

    def stream(self, prompt: array[int], params: Any) -> Iterator[Any]:
        text = self.tokenizer.decode(prompt)
        key = re.findall(r"number for (\S+) mentioned", text)[-1]
        answer = re.findall(rf"numbers for {key} is: (\d+)\.", text)[0]
        common: dict[str, Any] = {
            "request_id": "0", "num_prompt_tokens": len(prompt), "num_cached_tokens": 0}
        for done in range(0, len(prompt) + 1, len(prompt) // 4):
            yield Progress(**common, num_prefilled_tokens=done, elapsed_s=done / 500)
        output = RequestOutput(**common, text=answer, token_ids=(1,), finish_reason="stop",
                               ttft_s=8.0, prefill_s=8.0, decode_tokens_per_s=50.0, density=0.25,
                               recall=Recall(0.931, 0.872, 3_456))
        yield TokenEvent(**common, text=answer, token_ids=(1,), finish_reason="stop",
                         output=output)


def test_all_right_is_status_0(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(demo, "LLM", ReadingModel)
    assert cli.run_command(["demo", "--model", model, "--length", "4000", "--seed", "7"]) == 0
    captured = capsys.readouterr()
    assert "5 of 5 right" in captured.out and "WRONG" not in captured.out
    for text in ("seed 7", "4,000 tokens", "8.00 s", "500.0 tokens/s", "50.0 tokens/s", "25.0 %",
                 "93.1 % (3,456 tokens)", "87.2 %", "1.00 GiB"):
        assert text in captured.out
    assert "reading" in captured.err, "a plain log shows the progress"


def test_a_wrong_answer_is_status_1(capsys: Capture, model: str) -> None:
    arguments = ["demo", "--model", model, "--length", "4000", "--num-facts", "2",
                 "--device", "cpu"]
    assert cli.run_command(arguments) == 1
    out = capsys.readouterr().out
    assert "0 of 2 right" in out and out.count("WRONG") == 2
    # the second question finds the document in the prefix cache
    assert re.search(r"^\| 2 .* 3,\d\d\d \|$", out, re.MULTILINE)
    seeds = {re.findall(r"seed (\d+)", out)[0]}
    cli.run_command(arguments)
    seeds |= set(re.findall(r"seed (\d+)", capsys.readouterr().out))
    assert len(seeds) == 2, "a new seed each run"


def test_prompts_are_exact_and_repeat_with_the_seed(model: str) -> None:
    tokenizer = Tokenizer(Path(model))
    examples = demo.build(tokenizer, 5000, seed=3, num_facts=4)
    assert [len(example.prompt_ids) for example in examples] == [5000] * 4
    again = demo.build(tokenizer, 5000, seed=3, num_facts=4)
    assert [example.prompt_ids for example in again] == [e.prompt_ids for e in examples]
    assert demo.build(tokenizer, 5000, seed=4, num_facts=4) != examples


def test_too_short_is_one_line(capsys: Capture, model: str) -> None:
    assert cli.run_command(["demo", "--model", model, "--length", "100"]) == 2
    assert "too short for 5 facts" in capsys.readouterr().err


def test_numbers_are_hidden_in_a_persons_own_files(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "LLM", ReadingModel)
    for name in ("a.txt", "b.md", "c.py"):
        (tmp_path / name).write_text("".join(f"Line {i} of {name}.\n" for i in range(40)))
    arguments = ["demo", "--model", model, "--document", str(tmp_path / "a.txt"), "--document",
                 str(tmp_path), "--num-facts", "6", "--seed", "3"]
    assert cli.run_command(arguments) == 0
    captured = capsys.readouterr()
    assert "6 of 6 right" in captured.out and "3 documents, " in captured.err
    assert "named twice" in captured.err
    assert cli.run_command([*arguments, "--length", "4000"]) == 2
    assert "leave --length out" in capsys.readouterr().err


def test_hidden_numbers_leave_the_documents_whole(model: str) -> None:
    documents = [Document("a.txt", "One.\nTwo."), Document("b.txt", "<|im_end|>\nThree.")]
    examples = demo.hide(Tokenizer(Path(model)), documents, seed=1, num_facts=4)
    texts = [example.prompt.text.partition("\n\nWhat is")[0] for example in examples]
    assert len(set(texts)) == 1 and len({example.answer for example in examples}) == 4
    kept = [line for line in texts[0].splitlines() if "magic number" not in line]
    assert "\n".join(kept) == as_prompt(documents)
    assert all(0 < example.depth < 1 for example in examples)
    assert demo.hide(Tokenizer(Path(model)), documents, 1, 4)[0].prompt.text == texts[0] + (
        f"\n\n{examples[0].question} Answer with the number only.")
