"""``longspan synth instruct``: against a scripted server, with misfortunes, cut anywhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longspan.cli import run_command
from longspan.data import calls
from longspan.data.instruct.prompts import ALL, SUPPORTED
from longspan.data.lines import read_lines
from longspan.eval import endpoint
from longspan.train.tokenizer import save_tokenizer, train_tokenizer
from tests.data.conftest import make_text
from tests.eval.nasty import FAULTS, NastyServer

NUM_DOCUMENTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``text``: documents whose lines now and then name the keeper of a numbered gate."""
    folder = tmp_path_factory.mktemp("instruct")
    (folder / "text").mkdir()
    texts = []
    for i in range(NUM_DOCUMENTS):
        lines = make_text(i, 60).split("\n")
        for gate in range(12):
            number = 100 * i + gate + 100
            lines.insert(7 * gate + 3, f"The keeper of gate {number} is called warden{number}x.")
        texts.append("\n".join(lines))
        (folder / "text" / f"{i:02}.txt").write_text(texts[-1])
    save_tokenizer(train_tokenizer(texts, 700), folder / "tokenizer")
    return folder


class Model:
    """Answers every prompt by rule, from what stands in it; may be told to answer some badly."""

    def __init__(self, **bad: str) -> None:
        self.bad = bad
        self.asked: Counter[str] = Counter()

    def __call__(self, messages: Any) -> str:
        """Return the reply to a conversation."""
        text = messages[-1]["content"]
        name = name_of(text)
        self.asked[name] += 1
        over = "over" if name == "answer" and "<part " in text else name
        return self.bad.get(over) or self.bad.get(name) or getattr(self, name)(text)

    def query(self, text: str) -> str:
        """Return a question about the first gate of the segment."""
        gates = re.findall(r"keeper of gate (\d+) is called \w+\.", text)
        number = gates[0] if gates else "1"
        return f"Question: Who is the keeper of gate {number} in the town?\nAnswer: Somebody."

    def keywords(self, text: str) -> str:
        """Return the gate's number."""
        return "keeper, gate"

    def read(self, text: str) -> str:
        """Copy the sentence about the gate, with one that is made up; or say that there is none."""
        question, part = text.split("<part>")
        number = re.findall(r"gate (\d+)", question)[0]
        found = re.findall(rf"The keeper of gate {number} is called \w+\.", part)
        return f"{found[0]}\nInvented words stand nowhere, never." if found else "None"

    def step(self, text: str) -> str:
        """Ask once for something simpler."""
        number = re.findall(r"gate (\d+)", text)[0]
        return "Done" if "Which gates" in text else f"Ask: Which gates are near gate {number}?"

    def answer(self, text: str) -> str:
        """Return the sentence of the evidence."""
        number = re.findall(r"gate (\d+)", text.split("Question:")[-1])[0]
        found = re.findall(rf"The keeper of gate {number} is called \w+\.", text)
        return found[0] if found else "Not in the document"

    def closed(self, text: str) -> str:
        """Return nothing: nobody knows."""
        return "Unknown"

    def same(self, text: str) -> str:
        """Compare."""
        return "Yes"

    def supported(self, text: str) -> str:
        """Judge."""
        return "Yes"


def name_of(text: str) -> str:
    """Return which prompt a text was made of, by the prompt's last words."""
    for prompt in sorted(ALL, key=lambda prompt: -len(prompt.text)):
        pieces = re.split(r"<<\w+>>", prompt.text)
        if all(piece in text for piece in pieces):
            return prompt.name
    raise AssertionError(text)


def call(folder: Path, out: Path, url: str, *options: object) -> int:
    """Exit status of the command."""
    given = [str(option) for option in options]
    usual = {"--url": url, "--queries": 10, "--min-tokens": 256, "--segment": 256, "--part": 128,
             "--evidence": 512, "--answer": 64, "--held-out": 0, "--model": "m"}
    return run_command([
        "synth", "instruct", str(folder / "text"), "--tokenizer", str(folder / "tokenizer"),
        "--out", str(out), *given,
        *(str(part) for name, value in usual.items() if name not in given
          for part in (name, value))])


def of(out: Path, name: str) -> list[dict[str, Any]]:
    return list(read_lines(out / f"instruct-{name}.jsonl"))


def test_samples_carry_where_they_come_from(folder: Path, tmp_path: Path) -> None:
    nasty, out = NastyServer(model := Model()), tmp_path / "out"
    with nasty.serve() as url:
        assert call(folder, out, url, "--licence", "CC0") == 0
    samples, rejected = of(out, "train"), of(out, "rejected")
    assert len(samples) >= 6 and len(samples) + len(rejected) == 10
    for sample in samples:
        about = sample["provenance"]
        user, assistant = sample["messages"]
        number, = re.findall(r"gate (\d+) in the town", user["content"])
        assert assistant["content"] == f"The keeper of gate {number} is called warden{number}x."
        assert about["query"] in user["content"] and len(user["content"]) > 1500
        assert Path(about["document"]).name == f"{int(number) // 100 - 1:02}.txt"
        low, high = about["segment"]
        assert about["tokens"][0] <= low < high <= about["tokens"][1] and about["is_whole"]
        assert about["num_quotes"] == 1, "what was made up is no quotation"
        assert len(about["sub_questions"]) == 1
        prompts = [step["prompt"] for step in about["steps"]]
        assert prompts[:2] == ["query/2", "answer/1"] and prompts[2] == "closed/1"
        assert prompts.count("read/2") > 4
        verdicts = {verdict["filter"]: verdict["passed"] for verdict in about["verdicts"]}
        assert list(verdicts) == ["form", "answerable", "needs the document", "refusal", "length",
                                  "grounded", "supported", "agreement", "duplicate"]
        assert all(verdicts.values())
    kept = {(row["job"], row["call"]): row["text"] for row in of(out, "calls")}
    steps = [(s["provenance"]["job"], step["call"]) for s in samples
             for step in s["provenance"]["steps"]]
    seeds = [{body["seed"] for body in nasty.requests if s["provenance"]["query"] in str(body)}
             for s in samples]
    assert len({min(found) for found in seeds}) == len(samples) and max(map(len, seeds)) == 1
    assert set(steps) <= set(kept) and len(kept) == sum(model.asked.values())
    card = json.loads((out / "instruct-card.json").read_text())
    assert card["licence"] == "CC0" and card["model"] == "m"
    assert card["num_samples"] == len(samples) and card["num_rejected"] == len(rejected)
    assert card["filters"]["form"] == {"passed": 10, "rejected": 0}
    assert card["prompts"].keys() == {*(prompt.label for prompt in ALL), "wishes"}


@pytest.mark.parametrize(("bad", "filtered"), [
    ({"query": "No."}, "form"),
    ({"query": "The keeper of gate 101 is called warden101x."}, "form"),
    ({"query": "Question: What does this part say about the gates?"}, "form"),
    ({"answer": "The document does not mention it."}, "answerable"),
    ({"closed": "It is warden", "answer": "warden"}, "needs the document"),
    ({"query": "Is the keeper of gate 101 called warden101x?", "answer": "warden101x."},
     "needs the document"),
    ({"over": "The document does not mention it."}, "refusal"),
    ({"answer": "gate keeper warden town " * 9}, "length"),
    ({"answer": "The keeper of gate 4711 is called warden4711x."}, "grounded"),
    ({"answer": "Zebras wander quietly beneath purple mountains."}, "grounded"),
    ({"supported": "No."}, "supported")])
def test_each_filter_takes_out_what_it_is_for(
    folder: Path, tmp_path: Path, bad: dict[str, str], filtered: str
) -> None:
    out = tmp_path / "out"
    with NastyServer(Model(**bad)).serve() as url:
        assert call(folder, out, url, "--queries", 3) == 0
    assert [line["rejected"] for line in of(out, "rejected")] == [filtered] * 3
    assert of(out, "train") == []


def test_the_same_question_is_taken_once(folder: Path, tmp_path: Path) -> None:
    """Documents are asked a second time when there are more queries than documents."""
    out = tmp_path / "out"
    with NastyServer(Model()).serve() as url:
        assert call(folder, out, url, "--queries", 40, "--no-judge", "--read", "found") == 0
    queries = [sample["provenance"]["query"] for sample in of(out, "train")]
    assert len(queries) == len(set(queries)) and len(queries) < 40
    assert "duplicate" in {line["rejected"] for line in of(out, "rejected")}
    assert SUPPORTED.label not in {step["prompt"] for sample in of(out, "train")
                                   for step in sample["provenance"]["steps"]}


def test_misfortunes_and_cuts_change_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the server does, and wherever a run is cut: the same files, nothing asked twice."""
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.0)
    outs = {}
    quick = tuple(fault for fault in FAULTS if fault not in ("429", "silence"))
    for name, faults, options in (
            ("plain", (), ("--concurrency", 1)), ("nasty", quick, ()), ("cut", (), ())):
        out, nasty = tmp_path / name, NastyServer(model := Model(), faults)
        with nasty.serve() as url:
            if name == "cut":
                fail_after(monkeypatch, 25)
                with pytest.raises(KeyboardInterrupt):
                    run_command_raising(folder, out, url)
                monkeypatch.undo()
                before = len(of(out, "calls"))
                assert 25 <= before < 40, before
                with (out / "instruct-calls.jsonl").open("a") as file:
                    file.write('{"job": "torn')
            assert call(folder, out, url, "--timeout-s", 30, *options) == 0
        kept = {(row["job"], row["call"]) for row in of(out, "calls")}
        assert len(of(out, "calls")) == len(kept)
        # What was under way when the run was cut is asked once more, and nothing else.
        assert 0 <= sum(nasty.answered.values()) - len(kept) <= (8 if name == "cut" else 0)
        outs[name] = [(out / f"instruct-{part}").read_bytes()
                      for part in ("train.jsonl", "rejected.jsonl")]
        assert nasty.requests
    assert outs["plain"] == outs["nasty"] == outs["cut"]
    again = NastyServer(model)
    with again.serve() as url:
        assert call(folder, out, url) == 0
    assert again.requests == []


def fail_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make a run end, as an interrupt does, after so many kept replies."""
    kept = iter(range(count))

    def dump(content: object) -> str:
        if next(kept, None) is None:
            raise KeyboardInterrupt
        return json.dumps(content, ensure_ascii=False)

    monkeypatch.setattr(calls, "dump", dump)


def run_command_raising(folder: Path, out: Path, url: str) -> None:
    """Run the command; raises what an interrupt raises."""
    if call(folder, out, url) == 130:
        raise KeyboardInterrupt


def test_queries_without_an_answer_are_left_for_the_next_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.0)
    out, broken = tmp_path / "out", NastyServer(Model())
    with broken.serve() as url:
        broken.next_fault = lambda body: "503"  # type: ignore[method-assign]
        assert call(folder, out, url, "--queries", 2) == 1
        assert "2 queries got no answer" in capsys.readouterr().err
        assert of(out, "train") == of(out, "rejected") == []
        broken.next_fault = lambda body: None  # type: ignore[method-assign]
        assert call(folder, out, url, "--queries", 2) == 0
    assert len(of(out, "train")) + len(of(out, "rejected")) == 2


@pytest.mark.parametrize(("options", "message"), [
    (("--url", "http://127.0.0.1:9/v1"), "no server answers there"),
    (("--url", "nowhere"), "is no address"),
    (("--task", "song=1"), "no task named song: choose from"),
    (("--min-tokens", "100000"), "no document has 100,000 tokens"),
    (("--part", "600"), "evidence of 512 tokens has no room for a part"),
    (("--read", "some"), "--read: 'some' is not one of"),
    (("--include", "*.md"), "no text that can be used"),
    (("--evidence", "4000"), "m takes 2,000 tokens, prompts and answers here have up to")])
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...],
    message: str
) -> None:
    with NastyServer(Model(), max_model_len=2000).serve() as url:
        assert call(folder, tmp_path / "out", url, *options) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed


def test_a_wrong_key_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = NastyServer(Model())
    with nasty.serve() as url:
        nasty.next_fault = lambda body: "401"  # type: ignore[method-assign]
        assert call(folder, tmp_path / "out", url) == 2
    printed = capsys.readouterr().err
    assert "refuses the request (HTTP 401" in printed and printed.count("\n") == 1


def test_another_model_or_recipe_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with NastyServer(Model()).serve() as url:
        assert call(folder, out, url, "--queries", 1) == 0
        for options in (("--model", "other"), ("--seed", 1), ("--part", 64)):
            assert call(folder, out, url, *options) == 2
            assert "was made from other files or options" in capsys.readouterr().err
        assert call(folder, out, url, "--queries", 2) == 0
    assert len(of(out, "train")) + len(of(out, "rejected")) == 2
