"""The official client, unchanged, against a server on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.fake import ANSWER, MODEL, FakeEngine, Running, running, wait_for

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One for all tests that do not disturb it."""
    with running() as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    """The client."""
    with client_of(server) as client:
        yield client


def client_of(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=10)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert model.max_model_len == 4096


def test_chat(client):
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9)
    (choice,) = reply.choices
    assert choice.message.content == ANSWER[:9]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len("<user>Hello<assistant>")
    assert reply.usage.completion_tokens == 9
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 9


def test_chat_stream_with_usage(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=30, stop=["fox"], stream=True,
        stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).startswith(
        "The quick brown")
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 10
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_streaming_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=HELLO, stop="e") as stream:
        assert stream.get_final_completion().choices[0].message.content == "Th"


def test_follow_up_uses_the_cache(client):
    document = {"role": "user", "content": "A long document. " * 50}
    first = client.chat.completions.create(model=MODEL, messages=[document], max_tokens=5)
    again = client.chat.completions.create(model=MODEL, max_tokens=5, messages=[
        document, {"role": "assistant", "content": "The q"}, {"role": "user", "content": "Why?"}])
    details = [reply.usage.prompt_tokens_details for reply in (first, again)]
    assert details[0].cached_tokens < 100
    assert details[1].cached_tokens > 800


def test_chat_logprobs(client):
    reply = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert [item.token for item in content] == list(ANSWER[:3])
    assert [item.bytes for item in content] == [[ord(char)] for char in ANSWER[:3]]
    assert content[0].logprob == -0.5
    assert [item.logprob for item in content[0].top_logprobs] == [-0.5, -1.5, -9999.0]


def test_streamed_logprobs(client):
    chunks = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, logprobs=True, stream=True)
    items = [item for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
             for item in chunk.choices[0].logprobs.content]
    assert [item.token for item in items] == list(ANSWER[:5])
    assert all(item.top_logprobs == [] for item in items)


def test_echo(client):
    reply = client.completions.create(
        model=MODEL, prompt=["ab", [99, 100, 233]], max_tokens=3, echo=True, n=2)
    assert [choice.text for choice in reply.choices] == [
        *["ab" + ANSWER[:3]] * 2, *["cd\xe9" + ANSWER[:3]] * 2]
    assert all(choice.logprobs is None for choice in reply.choices)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 12)


@pytest.mark.parametrize("max_tokens", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(server, client, stream, max_tokens):
    reply = client.completions.create(
        model=MODEL, prompt="x\xe9z", max_tokens=max_tokens, echo=True, logprobs=1, n=2,
        stream=stream)
    choices = [choice for chunk in (reply if stream else [reply]) for choice in chunk.choices]
    for index in range(2):
        mine = [choice for choice in choices if choice.index == index]
        assert "".join(choice.text for choice in mine) == "x\xe9z" + ANSWER[:max_tokens]
        assert mine[-1].finish_reason == "length"
        parts = [choice.logprobs for choice in mine if choice.logprobs is not None]
        tokens = ["x", "\xe9", "z", *ANSWER[:max_tokens]]
        values = [None, -1.0, -2.0, *[-0.5] * max_tokens]
        assert [token for part in parts for token in part.tokens] == tokens
        assert [value for part in parts for value in part.token_logprobs] == values
        assert [top for part in parts for top in part.top_logprobs] == [
            None if value is None else {token: value}
            for token, value in zip(tokens, values, strict=True)]
        assert [place for part in parts for place in part.text_offset] == list(range(len(tokens)))
    scored, copied = (request.params for request in server.engine.requests[-2:])
    assert (scored.prompt_logprobs, scored.prompt_logprobs_start) == (1, 0)
    assert copied.prompt_logprobs_start == 3  # it takes the whole prompt from the cache


def test_scoring_takes_prompts_of_the_full_length(server, client):
    limit = server.engine.status().max_model_len
    values = {"model": MODEL, "max_tokens": 0, "echo": True, "logprobs": 0}
    reply = client.completions.create(prompt="x" * limit, **values)
    assert len(reply.choices[0].logprobs.tokens) == limit
    with pytest.raises(openai.BadRequestError, match="4097 tokens plus max_tokens 0 is 4097"):
        client.completions.create(prompt="x" * (limit + 1), **values)


def test_completion_logprobs(client):
    reply = client.completions.create(model=MODEL, prompt="x", max_tokens=4, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs.tokens == list(ANSWER[:4])
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.top_logprobs[1] == {"h": -0.5, "?": -1.5}


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99]])
def test_completion(client, prompt):
    reply = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6)
    assert reply.choices[0].text == ANSWER[:6]
    assert reply.usage.prompt_tokens == 3


def test_prompts_times_n(client, server):
    before = len(server.engine.requests)
    reply = client.completions.create(
        model=MODEL, prompt=["abcd", "efg"], n=3, seed=7, max_tokens=5)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert {choice.text for choice in reply.choices} == {ANSWER[:5]}
    assert reply.usage.prompt_tokens == 7
    assert reply.usage.completion_tokens == 30
    asked = server.engine.requests[before:]
    assert sorted(request.params.seed for request in asked) == [7, 7, 8, 8, 9, 9]


def test_n_streamed(client):
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
            model=MODEL, messages=HELLO, n=3, max_tokens=8, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [ANSWER[:8]] * 3


def test_options_reach_the_engine(client, server):
    client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, temperature=0.5, top_p=0.9, seed=-2,
        presence_penalty=0.5, frequency_penalty=-0.5, stop=["a", "b"],
        response_format={"type": "json_schema", "json_schema": {
            "name": "thing", "schema": {"type": "object"}, "strict": True}},
        logit_bias={"17": -3, "18": 100},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1})
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p, params.seed) == (0.5, 0.9, 2**63 - 2)
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.5)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.1)
    assert params.stop == ("a", "b")
    assert params.json_schema == '{"type": "object"}'
    assert params.logit_bias == ((17, -3.0), (18, 100.0))
    client.completions.create(model=MODEL, prompt="x", max_tokens=1, seed=-1)
    assert server.engine.requests[-1].params.seed is None  # each answer is another one


def test_lengths_reach_the_engine(client, server):
    client.completions.create(model=MODEL, prompt="x", max_tokens=7, extra_body={
        "ignore_eos": True, "min_tokens": 3})
    params = server.engine.requests[-1].params
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (7, 3, True)


def test_the_longest_default_completion_is_what_is_left(client, server):
    client.completions.create(model=MODEL, prompt="x" * 4000, stop="quick")
    assert server.engine.requests[-1].params.max_tokens == 96


def test_too_long(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 4000, max_tokens=200)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.body["prompt_tokens"] == 4000
    for number in ("4000", "200", "4200", "4096", "ask for at most 96"):
        assert number in caught.value.message


def test_too_long_while_streaming_has_its_own_status(client):
    with pytest.raises(openai.BadRequestError, match="4096"):
        client.completions.create(model=MODEL, prompt="x" * 5000, stream=True)


def test_another_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found"


def test_key():
    with running(api_keys=("secret", "second")) as server:
        with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        for key in ("secret", "second"):
            with client_of(server, key) as client:
                assert client.models.list().data


def test_full_queue():
    engine = FakeEngine(chunk_s=0.2, max_model_len=4096)
    with running(engine, max_queued_tokens=500) as server, client_of(server) as client:
        slow = client.completions.create(model=MODEL, prompt="x" * 900, stream=True)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=MODEL, prompt="y" * 900)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        slow.close()


@pytest.mark.parametrize("state", ["loading", "draining", "dead"])
def test_not_ready(state):
    with running(FakeEngine(state=state, reason="out of luck")) as server, \
            client_of(server) as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.status_code == 503
    assert caught.value.response.headers.get("retry-after") or state == "dead"


def test_cancelled_stream():
    with running(FakeEngine(token_s=0.02)) as server, client_of(server) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=4000, stream=True)
        next(iter(stream))
        stream.close()
        wait_for(lambda: server.engine.aborted, "the abort")


def test_cancelled_call():
    async def call(server: Running) -> None:
        async with openai.AsyncOpenAI(
                base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            task = asyncio.create_task(client.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=4000))
            while not server.engine.running:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with running(FakeEngine(chunk_s=5.0)) as server:
        asyncio.run(call(server))
        wait_for(lambda: server.engine.aborted, "the abort")


def test_the_engine_dies_in_a_stream():
    with running(FakeEngine(token_s=0.01)) as server, client_of(server) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=4000, stream=True)
        next(iter(stream))
        server.engine.set(state="dead", reason="killed")
        with pytest.raises(openai.APIError, match="died"):
            list(stream)
