"""The official client against nano itself, in processes of its own: penalties, bias,
log-probabilities and JSON schemas, from the HTTP request to the device and back."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import uvicorn

from longspan.commands.models import EngineModel
from longspan.config import EngineConfig
from longspan.engine.front.client import AsyncEngine
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.eval.endpoint import Endpoint, EndpointConfig
from longspan.eval.prompt import Frame, Prompt
from longspan.eval.text import Encoder
from longspan.serve.app import create_app
from longspan.serve.config import ServeConfig
from tests.serve.fake import wait_for

START_TIMEOUT_S = 120.0
PROMPT = "Once upon a time, there was a"
HELLO: list[Any] = [{"role": "user", "content": "Write é 🙂 and 漢字."}]
PERSON: dict[str, Any] = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False, "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150}}}


class Server:
    """Engine and application on an event loop of their own."""

    def __init__(self) -> None:
        self.engine: AsyncEngine | None = None
        self.server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        wait_for(lambda: self.server is not None and self.server.started, "start")
        wait_for(lambda: self.engine.status().state != "loading", "the model", START_TIMEOUT_S)
        assert self.engine.status().state == "ready", self.engine.status().reason
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server is not None
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.servers[0].sockets[0].getsockname()[1]

    async def _run(self) -> None:
        self.engine = AsyncEngine(EngineConfig(model="nano", device="cpu", max_model_len=2048))
        await self.engine.start()
        try:
            self.server = uvicorn.Server(uvicorn.Config(
                create_app(self.engine, ServeConfig()), port=0, log_config=None, http="h11",
                loop="asyncio", ws="none", timeout_graceful_shutdown=3))
            await self.server.serve()
        finally:
            await self.engine.close()


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with Server() as server, openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0,
            timeout=60) as client:
        yield client


def complete(client: openai.OpenAI, **values: Any) -> Any:
    extra = {"ignore_eos": True, **values.pop("extra_body", {})}
    return client.completions.create(**{
        "model": "nano", "prompt": PROMPT, "max_tokens": 24, "temperature": 0,
        "extra_body": extra, **values}).choices[0]


def chat(client: openai.OpenAI, **values: Any) -> Any:
    return client.chat.completions.create(**{
        "model": "nano", "messages": HELLO, "max_tokens": 24, "temperature": 0, **values})


def num_repeated(tokens: list[str]) -> int:
    return len(tokens) - len(set(tokens))


# -- penalties and bias ----------------------------------------------------------------------------


@pytest.mark.parametrize("values", [
    {"presence_penalty": 2.0}, {"frequency_penalty": 2.0},
    {"extra_body": {"repetition_penalty": 1.5}}], ids=str)
def test_penalties_make_repeats_rarer(client: openai.OpenAI, values: dict[str, Any]) -> None:
    free = complete(client, logprobs=0)
    found = [complete(client, logprobs=0, **values) for _ in range(2)]
    assert found[0].text == found[1].text != free.text
    assert num_repeated(found[0].logprobs.tokens) < num_repeated(free.logprobs.tokens)


def test_bias(client: openai.OpenAI) -> None:
    free = complete(client, max_tokens=1, logprobs=2)
    first, second = free.logprobs.top_logprobs[0]
    (banned,) = _tokenize(client, first)
    assert complete(client, max_tokens=1, logit_bias={str(banned): -100}).text == second


def _tokenize(client: openai.OpenAI, text: str) -> list[int]:
    reply = client.post(str(client.base_url).replace("/v1", "") + "tokenize", cast_to=object,
                        body={"prompt": text, "add_special_tokens": False})
    return reply["tokens"]


# -- log-probabilities -----------------------------------------------------------------------------


def check_chat_logprobs(text: str, content: list[Any], num_top: int) -> None:
    assert b"".join(bytes(item.bytes) for item in content).decode(errors="replace") == text
    for item in content:
        assert item.logprob <= 0 and len(item.top_logprobs) == num_top
        values = [other.logprob for other in item.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-5
        assert not num_top or values[0] >= item.logprob


@pytest.mark.parametrize("num_top", [0, 5])
def test_chat_logprobs(client: openai.OpenAI, num_top: int) -> None:
    choice = chat(client, logprobs=True, top_logprobs=num_top, temperature=1, seed=5).choices[0]
    check_chat_logprobs(choice.message.content, choice.logprobs.content, num_top)


def test_greedy_takes_the_most_probable(client: openai.OpenAI) -> None:
    content = chat(client, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert [item.logprob for item in content] == [
        item.top_logprobs[0].logprob for item in content]
    assert [item.token for item in content] == [item.top_logprobs[0].token for item in content]


def test_streamed_chat_logprobs(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0]
    text, content = "", []
    for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            content += choice.logprobs.content if choice.logprobs else []
    assert text == whole.message.content
    check_chat_logprobs(text, content, 2)
    assert [(item.token, item.bytes) for item in content] == [
        (item.token, item.bytes) for item in whole.logprobs.content]


def test_completion_logprobs(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3, temperature=1.5, seed=11)
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 24
    for token, logprob, top in zip(
            found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob and 3 <= len(top) <= 4
    assert found.text_offset == sorted(found.text_offset)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text.startswith(token, offset)


def test_streamed_completion_logprobs(client: openai.OpenAI) -> None:
    whole = complete(client, logprobs=1)
    chunks = complete_stream(client, logprobs=1)
    assert [token for chunk in chunks for token in chunk.tokens] == whole.logprobs.tokens
    assert [place for chunk in chunks for place in chunk.text_offset] == whole.logprobs.text_offset


def complete_stream(client: openai.OpenAI, **values: Any) -> list[Any]:
    stream = client.completions.create(
        model="nano", prompt=PROMPT, max_tokens=24, temperature=0, stream=True,
        extra_body={"ignore_eos": True}, **values)
    return [chunk.choices[0].logprobs for chunk in stream if chunk.choices[0].logprobs]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_has_the_log_probabilities_of_llm(client: openai.OpenAI, max_tokens: int) -> None:
    """For text and for token ids, cached or not, and every token's place in the text."""
    text = "<|im_start|>user\n" + PROMPT + " é🙂漢 who lived in a forest." * 12 + "<|im_end|>"
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=2, logprobs=2, ignore_eos=True)
    with LLM("nano", device="cpu", max_model_len=2048) as llm:
        token_ids = list(llm.tokenizer.encode(text))
        (wanted,) = llm.generate(token_ids, params)
    assert wanted.prompt_logprobs is not None
    logprobs = [*wanted.prompt_logprobs.tolist(), *(item.logprob for item in wanted.logprobs)]
    for prompt in (text, token_ids):
        choice = complete(client, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2)
        found = choice.logprobs
        assert choice.text == text + wanted.text and len(found.tokens) == len(logprobs)
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx(logprobs[1:], abs=1e-3)
        for token, value, top in list(zip(
                found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
            assert top[token] == value and max(top.values()) >= value and 2 <= len(top) <= 3
        assert found.text_offset == sorted(found.text_offset)
        # the completion leaves special tokens out of its text
        for token, offset in list(zip(
                found.tokens, found.text_offset, strict=True))[:len(token_ids)]:
            assert token.startswith("bytes:") or choice.text.startswith(token, offset)


def test_perplexity_is_the_same_over_http(client: openai.OpenAI) -> None:
    """What `longspan eval` takes from an endpoint, and what it computes itself."""
    with LLM("nano", device="cpu", max_model_len=2048) as llm:
        text = Encoder(llm.tokenizer).piece(PROMPT + " é🙂漢 who lived." * 30)
        prompt = Prompt([text], Frame("", ""))
        (wanted,) = EngineModel(llm).score([prompt])
    config = EndpointConfig(url=str(client.base_url), model="nano")
    with Endpoint(config) as endpoint:
        (found,) = endpoint.score([prompt])
    assert found.text == wanted.text == ""
    assert found.logprobs is not None and wanted.logprobs is not None
    assert len(found.logprobs) == len(prompt.ids) - 1
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-3)


def test_echo_streams_the_prompt_first(client: openai.OpenAI) -> None:
    whole = complete(client, logprobs=1, echo=True)
    chunks = complete_stream(client, logprobs=1, echo=True)
    assert [token for chunk in chunks for token in chunk.tokens] == whole.logprobs.tokens
    assert [place for chunk in chunks for place in chunk.text_offset] == whole.logprobs.text_offset
    assert whole.text.startswith(PROMPT)


def test_a_prompt_of_alternatives_shares_what_it_scores(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="nano", prompt=PROMPT * 20, max_tokens=2, n=3, echo=True, logprobs=0, temperature=1)
    tokens = [choice.logprobs.token_logprobs[:-2] for choice in reply.choices]
    assert tokens[0] == tokens[1] == tokens[2] and len(tokens[0]) > 100


# -- JSON ------------------------------------------------------------------------------------------


def person_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {
        "name": "person", "schema": schema, "strict": True}}


@pytest.mark.parametrize("values", [
    {}, {"temperature": 1, "seed": 3}, {"temperature": 1.5, "seed": 4, "frequency_penalty": 1}],
    ids=str)
def test_answers_fit_their_schema(client: openai.OpenAI, values: dict[str, Any]) -> None:
    (choice,) = chat(
        client, max_tokens=200, response_format=person_format(PERSON), **values).choices
    assert choice.finish_reason == "stop"
    person = json.loads(choice.message.content)
    assert set(person) == {"name", "age"}
    assert len(person["name"]) <= 12 and 0 <= person["age"] <= 150


def test_streamed_answer_fits_its_schema(client: openai.OpenAI) -> None:
    chunks = list(chat(client, max_tokens=200, stream=True, logprobs=True,
                       response_format=person_format(PERSON)))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert set(json.loads(text)) == {"name", "age"}


def test_the_parse_helper(client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Answer(BaseModel):
        is_long: bool
        words: int

    reply = client.chat.completions.parse(
        model="nano", messages=HELLO, max_tokens=240, temperature=0, response_format=Answer,
        logit_bias={str(token): -20 for token in _tokenize(client, "0123456789")})
    choice = reply.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Answer)


def test_any_object(client: openai.OpenAI) -> None:
    choice = chat(client, max_tokens=30, response_format={"type": "json_object"}).choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_cut_off_by_max_tokens(client: openai.OpenAI) -> None:
    choice = chat(client, max_tokens=4, response_format=person_format(PERSON)).choices[0]
    assert choice.finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(choice.message.content)


@pytest.mark.parametrize(("schema", "reason"), [
    ({"type": "thing"}, "Invalid type: thing"),
    ({"not": {"type": "string"}}, "Unimplemented keys"),
    ({"type": "string", "pattern": "(?<=a)b"}, "look-around")])
@pytest.mark.parametrize("stream", [False, True])
def test_schemas_that_cannot_be_followed(
    client: openai.OpenAI, schema: dict[str, Any], reason: str, stream: bool,
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        chat(client, response_format=person_format(schema), stream=stream)
    assert "json_schema" in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("values", [
    {"logit_bias": {"4096": 1}}, {"extra_body": {"min_tokens": 1, "stop_token_ids": [4096]}},
    {"extra_body": {"min_tokens": 1, "stop_token_ids": [2**31 - 1]}}], ids=str)
def test_what_is_no_token_is_refused(client: openai.OpenAI, values: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="integers from 0 to 4095"):
        chat(client, **values)
    assert chat(client, max_tokens=2).choices[0].finish_reason == "length"
