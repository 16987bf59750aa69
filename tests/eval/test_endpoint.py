"""Models behind an address: whatever the server does, nothing is lost and nothing counts twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import LongspanError, MissingDependencyError
from longspan.eval.endpoint import Endpoint, EndpointConfig, retry_after_s
from longspan.eval.prompt import Frame, Materials, Prompt
from longspan.eval.runner import Plan, run
from longspan.eval.samples import RunFolder
from longspan.eval.task import Model
from longspan.eval.tasks.registry import TaskOptions, make_tasks
from tests.eval.conftest import ChatTokenizer
from tests.eval.nasty import FAULTS, NastyServer, look_up

PLAN = Plan(tasks=make_tasks(["passkey", "needle", "niah_multivalue"], TaskOptions(
    num_questions=3, num_distractors=1)), lengths=(1024, 1536), num_samples=9)


def prompt_of(materials: Materials, text: str) -> Prompt:
    return Prompt([materials.encoder.piece(text)], materials.frame)


@contextmanager
def endpoint(nasty: NastyServer, **fields: Any) -> Iterator[tuple[Endpoint, list[float]]]:
    """An endpoint that does not sleep, and the pauses that it would have made."""
    pauses: list[float] = []
    with nasty.serve() as url:
        config = EndpointConfig(url=url, model="m", timeout_s=0.3, **fields)
        with Endpoint(config, pauses.append) as generate:
            yield generate, pauses


@pytest.fixture
def reader(tokenizer: ChatTokenizer) -> Any:
    """Answers passkey questions out of the prompt."""
    def read(prompt: Any) -> str:
        text = tokenizer.decode(prompt) if isinstance(prompt[0], int) else prompt[-1]["content"]
        return f"The number is {look_up(text)}." if "number for" in text else "no idea"
    return read


@pytest.mark.parametrize("concurrency", [1, 8])
def test_misfortunes_change_nothing(
    tmp_path: Path, materials: Materials, reader: Any, concurrency: int
) -> None:
    """Every kind of fault, again and again: the samples are those of a server without any."""
    found = []
    for faults in ((), FAULTS):
        nasty = NastyServer(reader, faults)
        with endpoint(nasty) as (generate, pauses), RunFolder(tmp_path / f"{len(faults)}") as out:
            outcome = run(PLAN, materials, Model(generate), out, concurrency=concurrency)
            found.append({key: (sample.ids_sha256, sample.text, sample.score, sample.status)
                          for key, sample in out.read().items()})
        assert (outcome.num_new, outcome.num_failed) == (54, 0)
        lines = (tmp_path / f"{len(faults)}" / "samples.jsonl").read_text().splitlines()
        assert len(lines) == len(found[-1]) == 54
        assert faults or nasty.most_running <= concurrency
    assert found[0] == found[1]
    assert len(nasty.requests) > 100 and max(nasty.answered.values()) == 1
    assert 7.0 in pauses and 0.0 in pauses, "both kinds of Retry-After are kept to"
    assert {score for key, (_, _, score, _) in found[0].items() if "passkey" in key} == {1.0}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_tried_again(materials: Materials, fault: str) -> None:
    nasty = NastyServer(lambda prompt: "an answer", (fault,))
    with endpoint(nasty) as (generate, pauses):
        (answer,) = generate([prompt_of(materials, "Hello")], 9)
    assert answer.text == "an answer" and len(nasty.requests) == 2
    assert len(pauses) == 1 and (pauses[0] == 7 if fault == "429" else pauses[0] <= 1)


def test_what_is_sent_and_what_comes_back(materials: Materials) -> None:
    nasty = NastyServer(lambda prompt: "an answer")
    prompt = prompt_of(materials, "Hello, world")
    with endpoint(nasty) as (generate, _):
        (answer,) = generate([prompt], 9)
        assert generate.say([{"role": "user", "content": "Rate"}], 5) == "an answer"
    first, second = nasty.requests
    assert first["prompt"] == list(prompt.ids) and first["max_tokens"] == 9
    assert (first["temperature"], first["model"]) == (0.0, "m")
    assert second["messages"] == [{"role": "user", "content": "Rate"}]
    assert answer.num_cached_tokens == 3 and answer.ttft_s is not None and answer.ttft_s > 0


def test_chat_servers_get_the_message_alone(
    tmp_path: Path, materials: Materials, reader: Any
) -> None:
    nasty = NastyServer(reader)
    frame = replace(materials.frame, prefix_in="user")
    plan = replace(PLAN, lengths=(1024,), num_samples=3)
    with endpoint(nasty, api="chat") as (generate, _), RunFolder(tmp_path) as out:
        run(plan, replace(materials, frame=frame), Model(generate), out)
        samples = out.read().values()
    contents = [body["messages"][0]["content"] for body in nasty.requests]
    assert not any("<|im_" in text for text in contents)
    assert sum(text.endswith("mentioned in the provided text are") for text in contents) == 3
    assert all(sample.score == 1.0 for sample in samples if sample.task == "passkey")
    assert all(sample.ttft_s and sample.num_cached_tokens for sample in samples)


def test_patience_has_an_end_and_the_next_run_asks_again(
    tmp_path: Path, materials: Materials, reader: Any
) -> None:
    plan = replace(PLAN, lengths=(1024,), num_samples=3)
    nasty = NastyServer(reader)
    nasty.next_fault = lambda body: "503"  # type: ignore[method-assign]
    with endpoint(nasty, max_attempts=3) as (generate, pauses), RunFolder(tmp_path) as out:
        outcome = run(plan, materials, Model(generate), out)
        samples = out.read()
    assert outcome.num_failed == outcome.num_new == len(samples) == 9
    assert {(s.status, s.score) for s in samples.values()} == {("error", None)}
    assert "no answer after 3 attempts: HTTP 503: status 503" in next(iter(samples.values())).error
    assert len(pauses) == 18  # two for each prompt
    with endpoint(NastyServer(reader)) as (generate, _), RunFolder(tmp_path) as out:
        assert run(plan, materials, Model(generate), out).num_new == 9
        assert {sample.status for sample in out.read().values()} == {"ok"}
        assert run(plan, materials, Model(generate), out).num_new == 0


def test_one_failure_loses_no_other_answer_of_its_document(
    tmp_path: Path, materials: Materials, reader: Any
) -> None:
    plan = replace(PLAN, tasks=PLAN.tasks[:1], lengths=(1024,), num_samples=3)
    nasty = NastyServer(reader)
    faults = iter(("503", "503"))
    nasty.next_fault = lambda body: next(faults, None)  # type: ignore[method-assign]
    with endpoint(nasty, max_attempts=1) as (generate, _), RunFolder(tmp_path) as out:
        run(plan, materials, Model(generate), out)
        assert [s.status for s in out.read().values()] == ["error", "error", "ok"]
        nasty.next_fault = lambda body: None  # type: ignore[method-assign]
        assert run(plan, materials, Model(generate), out).num_new == 2
        assert [s.score for s in out.read().values()] == [1.0, 1.0, 1.0]


def test_timeouts_are_told_apart(materials: Materials) -> None:
    nasty = NastyServer(lambda prompt: "x")
    nasty.next_fault = lambda body: "silence"  # type: ignore[method-assign]
    with endpoint(nasty, max_attempts=2) as (generate, _):
        (answer,) = generate([prompt_of(materials, "Hello")], 9)
    assert answer.status == "timeout" and answer.error.endswith("no word for 0.3 s")


def test_long_waits_end_before_the_attempts_do(materials: Materials) -> None:
    nasty = NastyServer(lambda prompt: "x")
    nasty.next_fault = lambda body: "429"  # type: ignore[method-assign]
    with endpoint(nasty, max_wait_s=20.0) as (generate, pauses):
        (answer,) = generate([prompt_of(materials, "Hello")], 9)
        with pytest.raises(LongspanError, match="no answer after 3 attempts"):
            generate.say([], 5)
        del pauses[2:]
    assert answer.error == "no answer after 3 attempts: HTTP 429: too many"
    assert pauses == [7.0, 7.0]


@pytest.mark.parametrize("status", ["400", "401", "404", "422"])
def test_what_does_not_pass_ends_the_run(materials: Materials, status: str) -> None:
    nasty = NastyServer(lambda prompt: "x", (status,))
    with endpoint(nasty) as (generate, pauses), \
            pytest.raises(LongspanError, match=rf"refuses the request \(HTTP {status}: status"):
        generate([prompt_of(materials, "Hello")], 9)
    assert pauses == []


def test_a_server_that_cuts_prompts_is_caught(materials: Materials) -> None:
    nasty = NastyServer(lambda prompt: "x", cut_prompts_at=2)
    with endpoint(nasty) as (generate, _), \
            pytest.raises(LongspanError, match="the server read 2 of 4 prompt tokens"):
        generate([Prompt([materials.encoder.piece("a b c d")._replace(
            ids=materials.encoder.piece("1234").ids)], Frame("", ""))], 9)


@pytest.mark.parametrize("limit", [None, 4096])
def test_the_limit_where_the_server_says_it(limit: int | None) -> None:
    with endpoint(NastyServer(lambda prompt: "x", max_model_len=limit)) as (generate, _):
        assert generate.max_model_len() == limit


def test_nobody_there(materials: Materials) -> None:
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="m")
    with Endpoint(config) as generate, \
            pytest.raises(LongspanError, match="no server answers there"):
        generate.max_model_len()


@pytest.mark.parametrize(("fields", "message"), [
    ({"url": "localhost:8000"}, "is no address such as"), ({"api": "grpc"}, "completions, chat"),
    ({"timeout_s": 0}, "must be positive"), ({"max_attempts": 0}, "must be positive")])
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        EndpointConfig(**{"url": "http://x/v1", "model": "m", **fields})


def test_without_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'longspan\[eval\]'"):
        Endpoint(EndpointConfig(url="http://x/v1", model="m"))


@pytest.mark.parametrize(("value", "seconds"), [
    ("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), (None, None),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)])
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value) == seconds
