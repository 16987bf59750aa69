"""Tries the clients that people have against a running server, each with its real package.

Two environments, since clients and engine need not agree on versions::

    python tests/clients/try_clients.py serve             # nano with a template that takes tools
    pip install openai langchain-openai llama-index-llms-openai-like litellm instructor \
        "pydantic-ai-slim[openai]"                        # in a fresh environment
    python tests/clients/try_clients.py http://127.0.0.1:8000/v1

A client that is not installed is named as such. The exit status is the number of failures.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUESTION = "What is the weather in Paris?"
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
                          "required": ["city"], "additionalProperties": False}
TOOL: Any = {"type": "function", "function": {
    "name": "Weather", "description": "Tells the weather of a city.", "parameters": SCHEMA}}
LIMIT: dict[str, Any] = {"max_tokens": 64}


def weather_model() -> Any:
    """A pydantic model of the tool's arguments."""
    from typing import Literal

    from pydantic import create_model

    cities: Any = Literal["Paris", "Rome"]
    return create_model("Weather", __doc__="Tells the weather.", city=(cities, ...))


def openai_client(url: str) -> Any:
    """The official client."""
    import openai

    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)


def openai_chat(url: str, model: str) -> None:
    """Chat, streamed and not."""
    client = openai_client(url)
    asked = {"model": model, "messages": [{"role": "user", "content": QUESTION}], **LIMIT}
    assert client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[-1].choices[0].finish_reason


def openai_tools(url: str, model: str) -> None:
    """A required call, streamed and not."""
    client = openai_client(url)
    asked = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "tools": [TOOL],
             "tool_choice": {"type": "function", "function": {"name": "Weather"}}, **LIMIT}
    call = client.chat.completions.create(**asked).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    with client.chat.completions.stream(**asked) as stream:
        message = stream.get_final_completion().choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")


def openai_parse(url: str, model: str) -> None:
    """Structured output by the official helper."""
    reply = openai_client(url).chat.completions.parse(
        model=model, messages=[{"role": "user", "content": QUESTION}],
        response_format=weather_model(), **LIMIT)
    assert reply.choices[0].message.parsed.city in ("Paris", "Rome")


def langchain_model(url: str, model: str) -> Any:
    """LangChain's chat model."""
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=model, base_url=url, api_key="none", max_retries=0, **LIMIT)


def langchain_bind_tools(url: str, model: str) -> None:
    """``bind_tools`` with a required call."""
    bound = langchain_model(url, model).bind_tools([weather_model()], tool_choice="Weather")
    assert bound.invoke(QUESTION).tool_calls[0]["args"]["city"] in ("Paris", "Rome")


def langchain_structured(url: str, model: str) -> None:
    """``with_structured_output``, by schema and by function calling, and a stream."""
    chat = langchain_model(url, model)
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(weather_model(), method=method).invoke(QUESTION)
        assert found.city in ("Paris", "Rome")
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION))


def llama_index_chat(url: str, model: str) -> None:
    """LlamaIndex's completion and structured prediction."""
    from llama_index.core import PromptTemplate
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=model, api_base=url, api_key="none", is_chat_model=True, timeout=300,
                     is_function_calling_model=True, max_retries=0, **LIMIT)
    assert str(llm.complete(QUESTION))
    found = llm.structured_predict(weather_model(), PromptTemplate(QUESTION))
    assert found.city in ("Paris", "Rome")


def litellm_tools(url: str, model: str) -> None:
    """LiteLLM's completion with tools, and a stream."""
    import litellm

    asked = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "max_retries": 0,
             "messages": [{"role": "user", "content": QUESTION}], "timeout": 300, **LIMIT}
    reply = litellm.completion(**asked, tools=[TOOL], tool_choice="required")
    assert reply.choices[0].message.tool_calls[0].function.name == "Weather"
    assert list(litellm.completion(**asked, stream=True))


def instructor_default(url: str, model: str) -> None:
    """Instructor in its default mode, tools."""
    import instructor

    client = instructor.from_openai(openai_client(url))
    found = client.chat.completions.create(
        model=model, response_model=weather_model(), max_retries=0,
        messages=[{"role": "user", "content": QUESTION}], **LIMIT)
    assert found.city in ("Paris", "Rome")


def pydantic_ai_default(url: str, model: str) -> None:
    """Pydantic AI with an output type, in its default mode, tools."""
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none")),
                  output_type=weather_model(), model_settings=LIMIT)
    assert asyncio.run(agent.run(QUESTION)).output.city in ("Paris", "Rome")


CLIENTS: tuple[tuple[str, Callable[[str, str], None]], ...] = (
    ("openai", openai_chat), ("openai", openai_tools), ("openai", openai_parse),
    ("langchain-openai", langchain_bind_tools), ("langchain-openai", langchain_structured),
    ("llama-index-llms-openai-like", llama_index_chat), ("litellm", litellm_tools),
    ("instructor", instructor_default), ("pydantic-ai-slim", pydantic_ai_default))


def serve() -> None:
    """Serve the bundled model with a template that takes tools. Does not return."""
    import longspan

    folder = Path(tempfile.mkdtemp(prefix="nano-tools-"))
    for file in (Path(longspan.__file__).parent / "nano").iterdir():
        shutil.copy(file, folder / file.name)
    shutil.copy(HERE / "tools.jinja", folder / "chat_template.jinja")
    os.execv(sys.executable, [
        sys.executable, "-m", "longspan.cli", "serve", str(folder), "--model-name", "nano",
        "--max-model-len", "8192", *sys.argv[2:]])


def main() -> int:
    """Try every client and print a table."""
    url, failures = sys.argv[1], 0
    model = sys.argv[2] if len(sys.argv) > 2 else "nano"
    for package, attempt in CLIENTS:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"| {package} | | not installed |")
            continue
        what = (attempt.__doc__ or "").rstrip(".")
        try:
            attempt(url, model)
            verdict = "works"
        except Exception as error:
            verdict = f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            failures += 1
        print(f"| {package} {version} | {what} | {verdict} |", flush=True)
    return failures


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    serve() if sys.argv[1] == "serve" else sys.exit(main())
