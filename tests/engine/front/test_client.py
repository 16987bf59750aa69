"""AsyncEngine over a fake model, and over a tiny checkpoint behind the real HTTP application."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import httpx
import pytest
import uvicorn

from longspan.config import EngineConfig
from longspan.engine.control.scheduler import SchedulerConfig
from longspan.engine.front.client import AsyncEngine, EngineUnavailableError, GenerateRequest
from longspan.engine.front.llm import LLM
from longspan.engine.front.stream import Stream
from longspan.engine.intake import Intake, default_sampling
from longspan.engine.processes.backend import Send
from longspan.engine.processes.in_thread import on_a_thread
from longspan.engine.processes.wire import Described
from longspan.engine.request import Progress, SamplingParams, TokenEvent
from longspan.engine.setup.load import load_engine
from longspan.engine.step import ScheduledBatch, StepResult
from longspan.errors import CheckpointError, InvalidRequestError, PromptTooLongError
from longspan.serve.app import create_app
from longspan.serve.config import ServeConfig
from tests.doubles import FakeRunner, complete, write_checkpoint, write_tokenizer

BLOCK, CHUNK, NUM_BLOCKS = 4, 8, 24
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPTS = [[1, 2, 3], list(range(30)), [7] * 21]
TIMEOUT_S = 20.0


class Runner(FakeRunner):
    """A fake that can be held before a step, and that can fail."""

    def __init__(self) -> None:
        super().__init__(num_blocks=NUM_BLOCKS, block_size=BLOCK, prefill_chunk_len=CHUNK)
        self.may_step = threading.Event()
        self.may_step.set()
        self.is_stepping = threading.Event()
        self.error: BaseException | None = None
        self.is_closed = False

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Wait until steps are allowed."""
        self.is_stepping.set()
        assert self.may_step.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        return super().execute(batch)

    def prepare(self, constraint: str) -> None:
        raise AssertionError("an engine on a thread compiles in the step")

    def close(self) -> None:
        """Remember."""
        self.is_closed = True


class Model:
    """Loads a `Runner`; what a test wants to go wrong is put in the attributes."""

    def __init__(self, path: Path) -> None:
        self.path, self.runner = path, Runner()
        self.may_load = threading.Event()
        self.may_load.set()
        self.error: Exception | None = None
        self.vocab_size = 300
        self.burst_s = 0.0

    def load(self, config: EngineConfig, send: Send) -> tuple[SchedulerConfig, Runner]:
        """As `longspan.engine.setup.load.load_engine`."""
        scheduler = SchedulerConfig(
            num_blocks=NUM_BLOCKS, block_size=BLOCK, max_model_len=64, prefill_chunk_len=CHUNK,
            max_num_requests=4, burst_s=self.burst_s)
        send(Described(
            path=self.path, intake=Intake(vocab_size=self.vocab_size, max_model_len=64),
            scheduler=scheduler))
        assert self.may_load.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        return scheduler, self.runner


@pytest.fixture
def model(tmp_path: Path) -> Model:
    write_tokenizer(tmp_path)
    return Model(tmp_path)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def started(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    """Ready, or dead; closed at the end, whatever happens."""
    try:
        await engine.start()
        await until(lambda: engine.status().state != "loading")
        yield engine
    finally:
        await engine.close()


def fake(model: Model) -> Any:
    return started(AsyncEngine(EngineConfig(model="some/model"), on_a_thread(model.load)))


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await work

    asyncio.run(limited(), debug=False)


def ask(prompt: Any, request_id: str = "r", **params: Any) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id, prompt=prompt,
        params=SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **params}))


async def tokens(stream: Stream) -> list[int]:
    return [token async for event in stream if isinstance(event, TokenEvent)
            for token in event.token_ids]


async def progress(stream: Stream) -> list[tuple[int, int, int]]:
    return [(event.num_prefilled_tokens, event.num_prompt_tokens, event.num_cached_tokens)
            async for event in stream if isinstance(event, Progress)]


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("burst_s", [0.0, 1.0])
def test_requests_side_by_side(model: Model, burst_s: float) -> None:
    model.burst_s = burst_s

    async def work() -> None:
        async with fake(model) as engine:
            streams = [await engine.add(ask(prompt, f"r{index}"))
                       for index, prompt in enumerate([*PROMPTS, *PROMPTS])]
            found = await asyncio.gather(*map(tokens, streams))
            assert found == [complete(prompt, PARAMS) for prompt in PROMPTS] * 2
            await until(lambda: engine.status().num_running == 0)
            assert engine.status().num_used_tokens == 0
            await streams[0].aclose()  # harmless after the end

    run(work())
    assert model.runner.is_closed


@pytest.mark.alone
def test_nobody_waits_for_a_hostile_schema(model: Model) -> None:
    levels = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    bomb = {"$defs": {**levels, "d30": {"type": "string", "pattern": "^a+$"}}, "$ref": "#/$defs/d0"}

    async def work() -> None:
        async with fake(model) as engine:
            def guided(schema: Any) -> asyncio.Task[Stream]:
                return asyncio.create_task(engine.add(GenerateRequest(
                    request_id="r", prompt=PROMPTS[0], params=SamplingParams(
                        max_tokens=6, json_schema=schema))))

            assert await tokens(await guided({"type": "integer"}))
            bombs = [guided({**bomb, "title": str(number)}) for number in range(20)]
            await asyncio.sleep(0.02)
            async with asyncio.timeout(0.5):
                assert await tokens(await engine.add(ask(PROMPTS[0]))) == \
                    complete(PROMPTS[0], PARAMS)
            assert not all(task.done() for task in bombs)
            for task in bombs[1:]:
                task.cancel()
            with pytest.raises(InvalidRequestError, match="more than (256 MiB of memory|0.5 s)"):
                await bombs[0]
            assert engine.status().num_waiting == engine.status().num_running == 0

    run(work())


def test_events_come_in_order(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            first = [event async for event in await engine.add(ask(PROMPTS[1]))]
            *rest, last = first
            assert [event.num_prefilled_tokens for event in rest
                    if isinstance(event, Progress)] == [0, 8, 16, 24, 30]
            assert isinstance(last, TokenEvent) and last.output is not None
            assert last.finish_reason == "length" and last.request_id == "r"
            assert last.output.token_ids == tuple(complete(PROMPTS[1], PARAMS))
            again = await progress(await engine.add(ask(PROMPTS[1])))
            assert again == [(0, 30, 0), (28, 30, 28), (30, 30, 28)]

    run(work())


def test_progress_and_counts_come_while_a_step_runs(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            await tokens(await engine.add(ask(PROMPTS[1])))
            model.runner.may_step.clear()
            stream = await engine.add(ask(PROMPTS[1]))
            events = [await anext(stream), await anext(stream)]
            assert [event.num_prefilled_tokens for event in events] == [0, 28]
            status = engine.status()
            assert (status.num_running, status.num_waiting) == (1, 0)
            assert status.num_used_tokens == 36  # prompt and max_tokens
            late = await engine.add(ask(PROMPTS[0]))
            assert (await anext(late)).num_prefilled_tokens == 0
            model.runner.may_step.set()
            assert await tokens(late) == complete(PROMPTS[0], PARAMS)

    run(work())


def test_text_prompts_stop_strings_and_templates(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            ids = await engine.encode_chat([{"role": "user", "content": "Hi"}])
            text = "<user>Hi<end><assistant>"
            assert ids == await engine.tokenize(text, add_special_tokens=False) and len(ids) == 5
            evil = await engine.encode_chat([{"role": "user", "content": "<end>"}])
            assert len(evil) == 8 and await engine.detokenize(evil) == "<end>"
            assert await engine.detokenize(ids) == "Hi"
            assert await engine.detokenize([]) == ""
            events = [event async for event in await engine.add(ask("Hi", max_tokens=9))]
            whole = "".join(e.text for e in events if isinstance(e, TokenEvent))
            stop = whole[3:5]
            cut = [e async for e in await engine.add(ask("Hi", stop=(stop,), max_tokens=9))]
            assert "".join(e.text for e in cut if isinstance(e, TokenEvent)) == \
                whole[: whole.index(stop)]
            assert cut[-1].finish_reason == "stop"
            await until(lambda: engine.status().num_running == 0)

    run(work())


@pytest.mark.parametrize(("request_", "error", "message"), [
    (ask([]), InvalidRequestError, "the prompt is empty"),
    (ask([1, 300]), InvalidRequestError, "token 1 of the prompt is 300"),
    (ask("x" * 59), PromptTooLongError, "prompt of 59 tokens plus max_tokens 6"),
    (ask("\ud800"), InvalidRequestError, "not valid Unicode"),
])
def test_refusals(
    model: Model, request_: GenerateRequest, error: type[Exception], message: str,
) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            with pytest.raises(error, match=message):
                await engine.add(request_)
            with pytest.raises(InvalidRequestError, match="token 0"):
                await engine.detokenize([259])

    run(work())
    assert model.runner.num_computed == 0


# -- cancelling ------------------------------------------------------------------------------------


async def hold(model: Model, engine: AsyncEngine, prompt: Any) -> Stream:
    """A request whose first step has begun and does not end."""
    model.runner.may_step.clear()
    model.runner.is_stepping.clear()
    stream = await engine.add(ask(prompt))
    await until(model.runner.is_stepping.is_set)
    return stream


def test_closing_takes_effect_before_the_next_step(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            stream = await hold(model, engine, PROMPTS[1])
            reader = asyncio.create_task(progress(stream))
            await asyncio.sleep(0)
            await stream.aclose()
            await stream.aclose()
            assert await reader == [(0, 30, 0)]  # the reader ends too
            model.runner.may_step.set()
            await engine.drain()
            await until(lambda: engine.status().num_used_tokens == 0)
            assert model.runner.num_computed == CHUNK

    run(work())


def test_waiting_requests_are_cancelled_and_ids_used_again(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            big = await hold(model, engine, [3] * 50)
            waiting = await engine.add(ask([4] * 50, "same"))
            await waiting.aclose()
            again = await engine.add(ask(PROMPTS[0], "same"))
            model.runner.may_step.set()
            assert await tokens(again) == complete(PROMPTS[0], PARAMS)
            assert await tokens(big) == complete([3] * 50, PARAMS)
            assert await tokens(waiting) == []
            assert not any(4 in item.token_ids for batch in model.runner.batches
                           for item in batch.slices if item.query_len > 1)

    run(work())


def test_a_lost_stream_is_cancelled(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            stream = await hold(model, engine, PROMPTS[1])
            pump = asyncio.create_task(tokens(stream))
            pump.cancel()  # before it starts: its own cleanup never runs
            with pytest.raises(asyncio.CancelledError):
                await pump
            del stream, pump
            gc.collect()
            await engine.drain()
            model.runner.may_step.set()
            await until(lambda: engine.status().num_used_tokens == 0)
            assert model.runner.num_computed == CHUNK

    run(work())


@pytest.mark.parametrize("burst_s", [0.0, 1.0])
def test_any_mix_of_arrivals_and_departures(model: Model, burst_s: float) -> None:
    """Survivors get the right answers, and the scheduler's own check finds no lost block."""
    model.burst_s = burst_s
    random = Random(4)

    async def one(engine: AsyncEngine, index: int) -> None:
        await asyncio.sleep(random.random() * 0.1)
        prompt = [random.randrange(3)] * random.randrange(1, 58)
        stream = await engine.add(ask(prompt, f"r{index % 7}"))
        if random.random() < 0.5:
            assert await tokens(stream) == complete(prompt, PARAMS)
        else:
            for _ in range(random.randrange(4)):
                await anext(stream)
            if random.random() < 0.5:
                await stream.aclose()

    async def work() -> None:
        async with fake(model) as engine:
            await asyncio.gather(*(one(engine, index) for index in range(150)))
            gc.collect()
            await engine.drain()
            await until(lambda: engine.status().num_used_tokens == 0)
            status = engine.status()
            assert (status.state, status.num_waiting, status.num_running) == ("draining", 0, 0)

    run(work())


def test_a_cancelled_call_hands_nothing_in(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            call = asyncio.create_task(engine.add(ask("Hi")))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await engine.drain()

    run(work())
    assert model.runner.num_computed == 0


# -- life and death --------------------------------------------------------------------------------


def test_loading_then_ready(model: Model) -> None:
    async def work() -> None:
        model.may_load.clear()
        engine = AsyncEngine(EngineConfig(model="some/model"), on_a_thread(model.load))
        await engine.start()
        try:
            await until(lambda: engine.status().max_model_len == 64)
            await asyncio.sleep(0.05)
            assert engine.status().state == "loading" and "some/model" in engine.status().reason
            with pytest.raises(EngineUnavailableError, match="being loaded"):
                await engine.tokenize("x")
            model.may_load.set()
            await until(lambda: engine.status().state == "ready")
            status = engine.status()
            assert (status.model, status.capacity_tokens) == ("some/model", 96)
        finally:
            await engine.close()
        assert engine.status().state == "dead"

    run(work())


@pytest.mark.parametrize(("error", "reason"), [
    (CheckpointError("no weights\nhere"), "no weights here"),
    (RuntimeError("out of order"), "RuntimeError: out of order"),
])
def test_a_failed_load(model: Model, error: Exception, reason: str) -> None:
    async def work() -> None:
        model.error = error
        async with fake(model) as engine:
            assert (engine.status().state, engine.status().reason) == ("dead", reason)
            with pytest.raises(EngineUnavailableError, match="no weights|out of order"):
                await engine.add(ask("x"))

    run(work())


def test_a_tokenizer_that_does_not_fit(model: Model) -> None:
    async def work() -> None:
        model.vocab_size = 200
        async with fake(model) as engine:
            assert engine.status().state == "dead"
            assert "the tokenizer knows 259 tokens" in engine.status().reason

    run(work())
    assert model.runner.is_closed


def test_the_engines_death_ends_every_stream(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            running = await hold(model, engine, PROMPTS[1])
            waiting = await engine.add(ask([4] * 50))
            model.runner.error = RuntimeError("device lost\nand more")
            model.runner.may_step.set()
            for stream in (running, waiting):
                with pytest.raises(EngineUnavailableError, match="RuntimeError: device lost$"):
                    await tokens(stream)
                await stream.aclose()
            assert engine.status().state == "dead" and engine.status().num_running == 0
            with pytest.raises(EngineUnavailableError) as raised:
                await engine.add(ask("x"))
            assert raised.value.http_status == 503
            await engine.drain()

    run(work())
    assert model.runner.is_closed


def test_draining_finishes_what_was_accepted(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            stream = await hold(model, engine, PROMPTS[1])
            draining = asyncio.create_task(engine.drain())
            await asyncio.sleep(0.01)
            assert engine.status().state == "draining" and not draining.done()
            with pytest.raises(EngineUnavailableError, match="no further requests"):
                await engine.add(ask("x"))
            model.runner.may_step.set()
            assert await tokens(stream) == complete(PROMPTS[1], PARAMS)
            await draining

    run(work())


def test_closing_ends_streams_at_once(model: Model) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            stream = await hold(model, engine, PROMPTS[1])
            closing = asyncio.create_task(engine.close())
            with pytest.raises(EngineUnavailableError, match="it was shut down"):
                await tokens(stream)
            model.runner.may_step.set()
            await closing

    run(work())
    assert model.runner.num_computed == CHUNK and model.runner.is_closed


def test_a_fault_in_one_text_ends_one_stream(
    model: Model, monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        async with fake(model) as engine:
            bad = await hold(model, engine, PROMPTS[1])
            good = await engine.add(ask(PROMPTS[0]))
            monkeypatch.setattr(bad._channel.completion, "push", lambda *_: 1 / 0)
            model.runner.may_step.set()
            with pytest.raises(ZeroDivisionError):
                await tokens(bad)
            assert await tokens(good) == complete(PROMPTS[0], PARAMS)
            await until(lambda: engine.status().num_used_tokens == 0)

    run(work())


def test_a_program_that_forgets_to_close(model: Model) -> None:
    async def work() -> None:
        await engine.start()
        await until(lambda: engine.status().state == "ready")
        await hold(model, engine, PROMPTS[1])

    engine = AsyncEngine(EngineConfig(model=str(model.path)), on_a_thread(model.load))
    run(work())
    model.runner.may_step.set()
    assert engine._backend is not None
    engine._backend.join(TIMEOUT_S)
    assert model.runner.is_closed and engine.status().model == model.path.name


@pytest.mark.parametrize(("text", "wanted"), [
    ('{"do_sample": false, "temperature": 0.7}', {"temperature": 0.0}),
    ('{"do_sample": false, "top_k": 20, "repetition_penalty": 1.05}',
     {"temperature": 0.0, "repetition_penalty": 1.05}),
    ('{"do_sample": true, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8}',
     {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05}),
    ('{"repetition_penalty": -1}', "generation_config.json: repetition_penalty is -1"),
    ('{"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": null, "x": 1}',
     {"temperature": 0.7, "top_k": 20}),
    ("{}", {}), (None, {}),
    ('{"top_p": 2}', "generation_config.json: top_p is 2"), ("[]", "not a JSON object"),
])
def test_advice_of_the_checkpoint(tmp_path: Path, text: str | None, wanted: Any) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    if isinstance(wanted, str):
        with pytest.raises(CheckpointError, match=wanted):
            default_sampling(tmp_path)
    else:
        assert default_sampling(tmp_path) == wanted


# -- behind HTTP -----------------------------------------------------------------------------------

QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0,
    "ignore_eos": True}


@asynccontextmanager
async def served(engine: AsyncEngine) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    """The real application on a free port of this event loop."""
    app = create_app(engine, ServeConfig())
    server = uvicorn.Server(uvicorn.Config(
        app, port=0, log_config=None, http="h11", loop="asyncio", ws="none"))
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
            yield client, app.state.service
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def tiny(path: Path, **options: Any) -> AsyncIterator[Any]:
    config = EngineConfig(model=str(path), **{
        "device": "cpu", "block_size": 16, "prefill_chunk_len": 64, **options})
    engine = AsyncEngine(config, on_a_thread(load_engine))
    async with started(engine), served(engine) as (client, service):
        assert engine.status().state == "ready", engine.status().reason
        yield engine, client, service


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def text_of(lines: list[str]) -> str:
    """The answer in a stream of chat events."""
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or ""
                   for chunk in chunks for choice in chunk["choices"])


def test_http_answers_are_those_of_llm(path: Path) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with LLM(str(path), device="cpu", block_size=16, prefill_chunk_len=64) as llm:
        wanted = llm.chat(QUESTION["messages"], params).text
        long = [llm.generate(text * 60, params)[0].text for text in "ab"]

    async def work() -> None:
        async with tiny(path) as (engine, client, _):
            report = engine.status()
            assert set(report.memory_bytes) == {"weights", "workspace", "KV cache"}
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == path.name
            reply = await client.post("/v1/chat/completions", json=QUESTION)
            assert reply.json()["choices"][0]["message"]["content"] == wanted
            async with client.stream(
                    "POST", "/v1/chat/completions", json={**QUESTION, "stream": True}) as stream:
                lines = [line async for line in stream.aiter_lines()]
            assert text_of(lines) == wanted and lines[-2] == "data: [DONE]"
            replies = await asyncio.gather(*(client.post("/v1/completions", json={
                "prompt": text * 60, "max_tokens": 8, "temperature": 0, "ignore_eos": True})
                for text in "ab"))
            assert [reply.json()["choices"][0]["text"] for reply in replies] == long

    run(work())


def test_hanging_up_cancels(path: Path) -> None:
    async def work() -> None:
        async with tiny(path) as (engine, client, service):
            async with client.stream("POST", "/v1/completions", json={
                    "prompt": "x", "max_tokens": 4000, "stream": True, "temperature": 0,
                    "ignore_eos": True}) as stream:
                lines = stream.aiter_lines()  # kept: losing it would hang up at once
                await anext(lines)
                await until(lambda: engine.status().num_running == 1)
            await until(lambda: engine.status().num_running == 0 and not service.gate.num_open)
            assert engine.status().num_used_tokens == 0

    run(work())


def test_failures_reach_the_client(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> NoReturn:
        raise RuntimeError("device lost")

    async def work() -> None:
        async with tiny(path) as (engine, client, _):
            monkeypatch.setattr("longspan.engine.device.runner.Runner.launch", lost)
            reply = await client.post("/v1/completions", json={
                "prompt": "x", "stream": True, "temperature": 0})
            assert '"error"' in reply.text and "device lost" in reply.text
            assert "[DONE]" not in reply.text and engine.status().state == "dead"
            refused = await client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_dead"
            assert (await client.get("/health")).status_code == 503

    run(work())
