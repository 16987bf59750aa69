"""What clients send: values that ask for nothing, hints, tools, and bodies as they come."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from longspan.engine.text.call_format import FORMATS
from longspan.serve.format import ChatFormat, Delta
from longspan.serve.messages import Message, Neutral
from longspan.serve.protocol import ChatRequest, CompletionRequest, StreamOptions
from tests.serve.fake import ANSWER, MODEL, FakeEngine, Running, running

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "Hi"}]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "server.md"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": False}
WEATHER: Any = {"type": "function", "function": {
    "name": "weather", "description": "Tells the weather.", "parameters": CITY}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}, "cache_control": {"type": "x"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One for all tests that do not disturb it."""
    with running(FakeEngine(call_format=FORMATS[0])) as server:
        yield server


def post(server: Running, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, timeout=10, headers={
        "Content-Type": "application/json", **headers})


def ask(server: Running, **body: Any) -> httpx.Response:
    return post(server, CHAT, {"messages": HI, "max_tokens": 3, **body})


# -- nothing and hints -----------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "change"), [
    (CHAT, {"tools": []}), (CHAT, {"tool_choice": "none"}), (CHAT, {"tool_choice": "auto"}),
    (CHAT, {"parallel_tool_calls": True}), (CHAT, {"store": True}), (CHAT, {"metadata": {"a": "b"}
                                                                             }),
    (CHAT, {"modalities": ["text"]}), (CHAT, {"service_tier": "flex"}),
    (CHAT, {"reasoning_effort": "low"}), (CHAT, {"verbosity": "low"}),
    (CHAT, {"prompt_cache_key": "x"}), (CHAT, {"safety_identifier": "x"}),
    (CHAT, {"prediction": {"type": "content", "content": "x"}}), (CHAT, {"functions": []}),
    (CHAT, {"function_call": "none"}), (CHAT, {"logprobs": False}), (CHAT, {"logit_bias": {}}),
    (CHAT, {"stop": []}), (CHAT, {"stop": ""}), (CHAT, {"response_format": {"type": "text"}}),
    (CHAT, {"skip_special_tokens": True, "use_beam_search": False, "length_penalty": 1.0}),
    (CHAT, {"top_p": 0}), (CHAT, {"stream_options": None}), (CHAT, {"audio": None}),
    (CHAT, {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}]}),
    (CHAT, {"messages": [*HI, {"role": "assistant", "content": "x", "annotations": None,
                               "refusal": None, "audio": None, "function_call": None,
                               "tool_calls": None}, *HI]}),
    (COMPLETE, {"best_of": 1}), (COMPLETE, {"suffix": ""}), (COMPLETE, {"echo": False}),
    (COMPLETE, {"logprobs": None}), (COMPLETE, {"user": "x", "store": False})])
def test_values_that_ask_for_nothing_pass_and_hints_are_taken(
    server: Running, path: str, change: dict[str, Any],
) -> None:
    body = {"messages": HI} if path == CHAT else {"prompt": "x"}
    reply = post(server, path, {**body, "max_tokens": 3, **change})
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    assert (choice["message"]["content"] if path == CHAT else choice["text"]) == ANSWER[:3]


@pytest.mark.parametrize(("path", "change"), [
    (CHAT, {"functions": [{"name": "f"}]}), (CHAT, {"modalities": ["text", "audio"]}),
    (CHAT, {"audio": {"voice": "x"}}), (CHAT, {"web_search_options": {}}),
    (CHAT, {"skip_special_tokens": False}), (CHAT, {"use_beam_search": True}),
    (CHAT, {"length_penalty": 0.5}), (CHAT, {"logit_processors": []}),
    (COMPLETE, {"best_of": 2}), (COMPLETE, {"best_of": True}), (COMPLETE, {"suffix": "x"})])
def test_what_would_change_the_answer_is_refused_by_name(
    server: Running, path: str, change: dict[str, Any],
) -> None:
    body = {"messages": HI} if path == CHAT else {"prompt": "x"}
    reply = post(server, path, {**body, **change})
    (name,) = change
    assert reply.status_code == 400 and name in reply.json()["error"]["message"]


def test_the_page_says_which_is_which() -> None:
    """Each field of the requests stands in a table of the page."""
    known = set(re.findall(r"`(\w+)", PAGE.read_text(encoding="utf-8")))
    fields = {name for model in (ChatRequest, CompletionRequest, StreamOptions, Message)
              for name in model.model_fields}
    assert fields - known == set()


def test_the_schema_says_what_a_neutral_field_takes() -> None:
    fields = ChatRequest.model_json_schema()["properties"]
    assert fields["modalities"]["enum"] == [None, ["text"]]
    assert any(isinstance(item, Neutral) for item in ChatRequest.model_fields["audio"].metadata)


def test_top_p_zero_is_the_most_probable_token(server: Running) -> None:
    assert ask(server, top_p=0).status_code == 200
    assert server.engine.requests[-1].params.top_p == 0


def test_minus_one_is_as_many_tokens_as_there_is_room_for(server: Running) -> None:
    post(server, COMPLETE, {"prompt": "x" * 4000, "max_tokens": -1})
    assert server.engine.requests[-1].params.max_tokens == 96
    assert ask(server, max_tokens=None, max_completion_tokens=-1).status_code == 200
    assert server.engine.requests[-1].params.max_tokens == 4096 - len("<user>Hi<assistant>")


def test_usage_in_every_chunk(server: Running) -> None:
    reply = ask(server, stream=True, stream_options={
        "include_usage": True, "continuous_usage_stats": True})
    lines = [line for line in reply.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line[6:]) for line in lines]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 3 and len(counts) >= 2


# -- bodies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gzip", "GZIP", "x-gzip"])
def test_packed_bodies(server: Running, name: str) -> None:
    body = gzip.compress(json.dumps({"messages": HI, "max_tokens": 3}).encode())
    reply = post(server, CHAT, body, **{"Content-Encoding": name})
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER[:3]


def test_packed_bodies_that_are_none(server: Running) -> None:
    whole = gzip.compress(b'{"prompt": "x"}')
    for body in (b"{}", whole[:-3], whole + b"x", b""):
        reply = post(server, COMPLETE, body, **{"Content-Encoding": "gzip"})
        assert reply.status_code == 400 and "gzip" in reply.json()["error"]["message"]
    for name in ("br", "deflate", "gzip, gzip"):
        reply = post(server, COMPLETE, zlib.compress(b"{}"), **{"Content-Encoding": name})
        assert reply.status_code == 415 and "gzip" in reply.json()["error"]["message"]


def test_little_that_becomes_much() -> None:
    """A body is counted as it is unpacked: 64 MiB of spaces come in 64 KiB."""
    bomb = gzip.compress(b" " * 2**26)
    with running(max_body_bytes=2**20) as server:
        reply = post(server, COMPLETE, bomb, **{"Content-Encoding": "gzip"})
        assert len(bomb) < 2**20 and reply.status_code == 413


@pytest.mark.parametrize(("text", "read"), [
    (r"cut \ud83d", "cut \ufffd"), (r"\ude42", "\ufffd"), (r"\ud83d\ude42", "🙂"),
    (r"\ud83dx\ude42", "\ufffdx\ufffd"), (r"\\ud83d", r"\ud83d"),
    (r"\ud83d\ud83d\ude42", "\ufffd🙂"),
    (r"\\\ud83d\n", "\\\ufffd\n")])
def test_halves_of_characters_are_replaced(server: Running, text: str, read: str) -> None:
    good = r"\ud800"  # something has to be mended in each of them
    body = f'{{"messages": [{{"role": "user", "content": "{text}", "name": "{good}"}}]}}'
    assert post(server, CHAT, body.encode()).status_code == 200
    (message,) = server.engine.chats[-1][0]
    assert message == {"role": "user", "content": read, "name": "\ufffd"}


def test_a_model_by_its_name(server: Running) -> None:
    card = httpx.get(f"{server.url}/v1/models/{MODEL}").json()
    assert card == httpx.get(server.url + "/v1/models").json()["data"][0]
    assert httpx.get(server.url + "/v1/models/other").status_code == 404
    with running(FakeEngine(model="Qwen/Qwen2.5")) as other:
        assert httpx.get(other.url + "/v1/models/Qwen/Qwen2.5").status_code == 200
        assert httpx.get(other.url + "/v1/models/Qwen%2FQwen2.5").status_code == 200


# -- the beginning of an answer --------------------------------------------------------------------


def test_the_last_message_may_be_continued(server: Running) -> None:
    begun = [*HI, {"role": "assistant", "content": "Sure: "}]
    for flags in ({}, {"add_generation_prompt": False}):
        reply = ask(server, messages=begun, continue_final_message=True, **flags)
        assert reply.json()["choices"][0]["message"]["content"] == ANSWER[:3]
        values = server.engine.chats[-1][1]
        assert values["continue_final_message"] and not values["add_generation_prompt"]
    both = ask(server, messages=begun, continue_final_message=True, add_generation_prompt=True)
    assert both.status_code == 400
    ask(server, messages=begun)
    assert server.engine.chats[-1][1]["add_generation_prompt"]


# -- tools -----------------------------------------------------------------------------------------


@pytest.fixture
def caller() -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    """The official client of a model that calls the weather tool twice."""
    engine = FakeEngine(call_format=FORMATS[0], answer=f"Let me see.\n{CALL}\n{CALL}")
    with running(engine) as server, openai.OpenAI(
            base_url=server.url + "/v1", api_key="x", max_retries=0, timeout=10) as client:
        yield client, engine


def test_calls_in_an_answer(caller: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, engine = caller
    reply = client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER, CLOCK])
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    assert [call.function.arguments for call in choice.message.tool_calls] == [
        '{"city": "Paris"}'] * 2
    assert {call.function.name for call in choice.message.tool_calls} == {"weather"}
    assert len({call.id for call in choice.message.tool_calls}) == 2
    values = engine.chats[-1][1]
    assert values["tools"] == [WEATHER, {"type": "function", "function": {
        "name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}}}]
    assert engine.requests[-1].params.grammar is None  # the model may say what it likes


def test_streamed_calls(caller: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, _ = caller
    chunks = list(client.chat.completions.create(
        model=MODEL, messages=HI, tools=[WEATHER], stream=True))
    text, calls = "", dict[int, list[Any]]()
    for delta in (chunk.choices[0].delta for chunk in chunks):
        text += delta.content or ""
        for call in delta.tool_calls or ():
            if call.id:
                assert call.type == "function" and call.index not in calls
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments
    assert text == "Let me see." and chunks[-1].choices[0].finish_reason == "tool_calls"
    assert calls == {0: ["weather", '{"city": "Paris"}'], 1: ["weather", '{"city": "Paris"}']}
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 20  # as they come


def test_the_streaming_helper_reads_calls(caller: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, _ = caller
    with client.chat.completions.stream(model=MODEL, messages=HI, tools=[WEATHER]) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Paris"}] * 2


def test_no_calls_without_tools(caller: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, engine = caller
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        reply = client.chat.completions.create(  # type: ignore[call-overload]
            model=MODEL, messages=HI, **options)
        assert reply.choices[0].message.tool_calls is None
        assert reply.choices[0].finish_reason == "stop" and CALL in reply.choices[0].message.content
        assert "tools" not in engine.chats[-1][1]


def test_an_answer_that_is_cut_off_amid_a_call(
    caller: tuple[openai.OpenAI, FakeEngine],
) -> None:
    client, _ = caller
    reply = client.chat.completions.create(
        model=MODEL, messages=HI, tools=[WEATHER], max_tokens=70)
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.tool_calls[0].function.arguments.startswith('{"cit')


def test_one_call_at_most(caller: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, _ = caller
    reply = client.chat.completions.create(
        model=MODEL, messages=HI, tools=[WEATHER], parallel_tool_calls=False)
    assert len(reply.choices[0].message.tool_calls or ()) == 1
    assert reply.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(("choice", "names", "is_single"), [
    ("required", ["weather", "clock"], False),
    ({"type": "function", "function": {"name": "clock"}}, ["clock"], True)])
def test_calls_that_are_wanted_are_held_to_the_schemas(
    server: Running, choice: Any, names: list[str], is_single: bool,
) -> None:
    assert ask(server, tools=[WEATHER, CLOCK], tool_choice=choice).status_code == 200
    grammar = server.engine.requests[-1].params.grammar or ""
    assert re.findall(r'"name\\": \\"(\w+)\\"', grammar) == names
    assert ("call){0," not in grammar) == is_single and "answer" not in grammar


def test_a_schema_for_answers_beside_tools(server: Running) -> None:
    ask(server, tools=[WEATHER], response_format={"type": "json_object"})
    params = server.engine.requests[-1].params
    assert params.json_schema is None and params.grammar.startswith("start: calls | answer\n")


def test_a_conversation_with_calls(server: Running) -> None:
    history = [*HI, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "weather",
                                                     "arguments": '{"city": "Paris"}'}},
        {"id": "b", "type": "function", "function": {"name": "clock", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "sunny"}]}]
    assert ask(server, messages=history, tools=[WEATHER]).status_code == 200
    _, called, clock, weather = server.engine.chats[-1][0]
    assert called["content"] == "" and [
        call["function"] for call in called["tool_calls"]] == [
        {"name": "weather", "arguments": {"city": "Paris"}}, {"name": "clock", "arguments": {}}]
    assert clock == {"role": "tool", "content": "noon", "name": "clock", "tool_call_id": "b"}
    assert (weather["name"], weather["content"]) == ("weather", "sunny")


@pytest.mark.parametrize(("change", "word"), [
    ({"tool_choice": "required"}, "needs tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "'x'"),
    ({"tools": [WEATHER, WEATHER]}, "one name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
     "an object"),
    ({"tools": [{"type": "web_search"}]}, "tools.0"),
    ({"tools": [CLOCK] * 129}, "tools"),
    ({"messages": [{"role": "user", "content": None}]}, "content is missing"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {
        "name": "f", "arguments": "[1]"}}]}]}, "no JSON object"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {
        "name": "f", "arguments": "{"}}]}]}, "no JSON"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "a", "function": {
        "name": "f", "arguments": "{}"}}]}]}, "assistant's")])
def test_tools_that_are_wrong(server: Running, change: dict[str, Any], word: str) -> None:
    reply = ask(server, **change)
    assert reply.status_code == 400 and word in reply.json()["error"]["message"], reply.text


def test_a_model_that_takes_no_tools() -> None:
    with running() as server:
        reply = ask(server, tools=[WEATHER])
        assert reply.status_code == 400 and "takes no tools" in reply.json()["error"]["message"]
        assert ask(server, tools=[WEATHER], tool_choice="none").status_code == 200


def test_a_chunk_has_one_object_for_each_call() -> None:
    """Clients keep the first object of several with one index, as the official one does."""
    form = ChatFormat(
        "id", "m", with_logprobs=False, call_format=FORMATS[0], tool_names=["weather"])
    arguments = '{"city": "Paris"}'
    cut = CALL.index(arguments) + 12
    delta = Delta(0, text=f"{CALL}\n{CALL[:cut]}")
    (first, second) = form.chunk(delta)["choices"][0]["delta"]["tool_calls"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["function"] == {"name": "weather", "arguments": arguments}
    assert second["function"]["arguments"] == arguments[:12]
    rest = form.chunk(Delta(0, text=CALL[cut:], finish_reason="stop"))["choices"][0]
    assert rest["delta"]["tool_calls"] == [
        {"index": 1, "function": {"arguments": arguments[12:]}}]
    assert rest["finish_reason"] == "tool_calls"
