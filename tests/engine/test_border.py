"""Numbers that become an index or a size on the device are checked before anything is computed:
from Python, over HTTP, and in a checkpoint's files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.engine.front.client import GenerateRequest
from longspan.engine.front.llm import LLM
from longspan.engine.intake import Intake
from longspan.engine.processes.wire import Add, Codec, ToScheduler, encode
from longspan.engine.request import SamplingParams
from longspan.engine.text.tokenizer import load_tokenizer
from longspan.errors import CheckpointError, InvalidRequestError
from tests.doubles import make_request, write_checkpoint, write_tokenizer
from tests.engine.front.test_client import run, tiny

JSON = {"Content-Type": "application/json"}
VOCAB = 264  # of `write_checkpoint`
RANGE = "token ids of this model are integers from 0 to 263"
NO_TOKENS: list[tuple[dict[str, Any], str]] = [
    ({"stop_token_ids": [VOCAB]}, f"stop_token_ids names token 264; {RANGE}"),
    ({"stop_token_ids": [1, VOCAB], "min_tokens": 1}, f"stop_token_ids names token 264; {RANGE}"),
    ({"stop_token_ids": [2**31 - 1]}, f"stop_token_ids names token 2147483647; {RANGE}"),
    ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias names token 264; {RANGE}"),
    ({"logit_bias": {2**32: 1.0}}, f"logit_bias names token 4294967296; {RANGE}"),
    ({"prompt": [1, VOCAB]}, f"token 1 of the prompt is 264; {RANGE}"),
    ({"prompt": [[1, 2], [1, 2, VOCAB]]}, f"token 2 of the prompt is 264; {RANGE}"),
]
"""Both doors say the same."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(str(path), device="cpu", block_size=8, prefill_chunk_len=32) as llm:
        yield llm


# -- ids that are no tokens of the model -----------------------------------------------------------


@pytest.mark.parametrize(("fields", "message"), NO_TOKENS)
def test_python_names_what_is_no_token(llm: LLM, fields: dict[str, Any], message: str) -> None:
    values = {"prompt": "hi", "max_tokens": 4, **fields}
    prompt = values.pop("prompt")
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(prompt, SamplingParams(**values))
    assert str(caught.value) == message


def test_http_and_asyncio_name_what_is_no_token(path: Path) -> None:
    async def work() -> None:
        async with tiny(path) as (engine, client, _):
            for fields, message in NO_TOKENS:
                body = {"prompt": "hi", "max_tokens": 4, **fields}
                reply = await client.post(
                    "/v1/completions", content=json.dumps(body), headers=JSON)
                assert (reply.status_code, reply.json()["error"]["message"]) == (400, message)
            with pytest.raises(InvalidRequestError, match="stop_token_ids names token 264"):
                await engine.add(GenerateRequest(
                    request_id="r", prompt="hi",
                    params=SamplingParams(min_tokens=1, stop_token_ids=(VOCAB,))))
            reply = await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 4})
            assert reply.status_code == 200

    run(work())


WRONG_KIND: list[dict[str, Any]] = [
    {"stop_token_ids": [-1]}, {"stop_token_ids": [2**70]}, {"stop_token_ids": [1.0]},
    {"stop_token_ids": [True]}, {"stop_token_ids": 5}, {"stop_token_ids": "12"},
    {"logit_bias": {"-1": 1}}, {"logit_bias": {"1.0": 1}}, {"logit_bias": {"99999999999": 1}},
    {"prompt": [-1]}, {"prompt": [1.0]}, {"prompt": [True]}, {"prompt": [2**70]},
    {"prompt": [[1], [[2]]]}, {"prompt": [[1], 2]}, {"prompt": 7},
    {"top_k": 2**31}, {"top_k": 4.0}, {"top_k": True}, {"seed": 2**63}, {"seed": 1.0},
    {"n": 1.0}, {"n": True}, {"n": -1}, {"max_tokens": 2**31}, {"max_tokens": 4.0},
    {"min_tokens": -1}, {"logprobs": -1}, {"logprobs": True}, {"temperature": 1e300},
    {"temperature": True}, {"repetition_penalty": 1e-30}, {"repetition_penalty": 1e30},
    {"ignore_eos": 1},
]


def test_http_refuses_numbers_of_the_wrong_kind(path: Path) -> None:
    async def work() -> None:
        async with tiny(path) as (_, client, _):
            for fields in WRONG_KIND:
                body = {"prompt": "hi", "max_tokens": 4, **fields}
                reply = await client.post(
                    "/v1/completions", content=json.dumps(body), headers=JSON)
                assert reply.status_code == 400, fields
                message = reply.json()["error"]["message"]
                assert next(iter(fields)) in message and "\n" not in message, fields

    run(work())


def test_more_alternatives_than_tokens() -> None:
    intake = Intake(vocab_size=9, max_model_len=64)
    intake.make("r", [1], SamplingParams(max_tokens=4, logprobs=9), frozenset())
    with pytest.raises(InvalidRequestError) as caught:
        intake.make("r", [1], SamplingParams(max_tokens=4, logprobs=10), frozenset())
    assert str(caught.value) == "logprobs asks for 10 alternatives; this model has 9 tokens"


# -- values that Python programs give --------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", 10**400), ("temperature", 1e300), ("temperature", float("nan")),
    ("top_k", 2**31), ("top_k", 10**30), ("top_p", float("nan")), ("min_p", float("nan")),
    ("seed", 2**64), ("seed", 1.0), ("max_tokens", 4.0), ("max_tokens", True),
    ("repetition_penalty", 1e-50), ("repetition_penalty", 1e300),
    ("presence_penalty", float("inf")), ("logprobs", 1.0), ("ignore_eos", 1),
    ("ignore_eos", "no"), ("stop", "\ud800"), ("stop", 5), ("stop", b"ab"),
    ("stop_token_ids", 5), ("stop_token_ids", "12"),
    ("stop_token_ids", [1.0]), ("stop_token_ids", [True]), ("logit_bias", {1.0: 1}),
    ("logit_bias", {True: 1}), ("logit_bias", {1: float("nan")}), ("logit_bias", {1: True}),
    ("json_schema", "\ud800"), ("temperature", np.bool_(True)), ("temperature", 1j),
])
def test_fields_that_no_engine_could_follow(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value", "plain"), [
    ("temperature", np.float64(0.5), 0.5), ("temperature", np.float32(0.5), 0.5),
    ("temperature", Fraction(1, 2), 0.5), ("top_k", np.int64(3), 3), ("seed", np.int32(3), 3),
    ("stop", np.str_("ab"), ("ab",)), ("stop_token_ids", np.array([1, 2]), (1, 2)),
    ("logit_bias", {np.int64(3): np.float32(0.5)}, ((3, 0.5),)),
    ("json_schema", np.str_("{}"), "{}"),
])
def test_numbers_of_other_classes_travel_as_plain_ones(name: str, value: Any, plain: Any) -> None:
    request = make_request("r", [1], **{name: value})
    sent = Codec(ToScheduler).decode(encode(Add(request)))
    assert getattr(sent.request.params, name) == getattr(request.params, name) == plain


@pytest.mark.parametrize("prompt", [b"hi", [b"hi"], bytearray(b"hi"), [{1, 2}], {1: 2}, [[[1]]],
                                    [[1], 2], [None], [1.0], [True]], ids=repr)
def test_what_is_no_prompt(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate(prompt, SamplingParams(max_tokens=1))


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("value", "message"), [
    (VOCAB, "eos_token_id is 264, and the model has 264 tokens"),
    ([1, 10**12], "eos_token_id is 1000000000000, and the model has 264 tokens"),
    (-1, "eos_token_id is -1; a token id or a list of them is needed"),
    ("2", "eos_token_id is '2'; a token id"), ([1, "2"], r"eos_token_id is \[1, '2'\]; a token id"),
    (1.0, "eos_token_id is 1.0; a token id"), (True, "eos_token_id is True; a token id"),
    ([[1]], r"eos_token_id is \[\[1\]\]; a token id"), ({"a": 1}, "eos_token_id is {'a': 1}"),
])
def test_end_tokens_of_a_checkpoint(tmp_path: Path, name: str, value: Any, message: str) -> None:
    write_checkpoint(tmp_path)
    file = tmp_path / name
    raw = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**raw, "eos_token_id": value}))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path, VOCAB)


def test_an_end_token_that_is_no_text(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": 5}}')
    with pytest.raises(CheckpointError, match="eos_token is 5; a string is needed"):
        LLM(str(tmp_path), device="cpu", block_size=8, prefill_chunk_len=32)


def test_few_tokens_with_high_ids(tmp_path: Path) -> None:
    """A tokenizer may leave ids out: the highest one counts, not how many there are."""
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    raw = json.loads(file.read_text())
    vocab = raw["model"]["vocab"]
    vocab[next(text for text, token in vocab.items() if token == 77)] = 300
    file.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="knows 301 tokens, the model only 264"):
        load_tokenizer(tmp_path, VOCAB)
