"""Three processes: answers, cancelling, faults. The runner's process computes a fake model that
checks every block it is given."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from longspan.config import EngineConfig
from longspan.engine.control.loop import MAX_SHORT_STEPS
from longspan.engine.front.client import AsyncEngine, EngineUnavailableError, GenerateRequest
from longspan.engine.front.stream import MAX_UNREAD, Stream
from longspan.engine.processes.launch import Processes, in_processes
from longspan.engine.processes.spawning import private_directory
from longspan.engine.processes.wire import Loaded, Stepped, encode
from longspan.engine.request import Progress, SamplingParams, TokenEvent
from longspan.engine.step import StepResult
from longspan.errors import LongspanError
from tests.doubles import EOS, complete
from tests.engine.processes.far_runner import CHUNK, LOADER, steps, write_model

TIMEOUT_S = 30.0
LONG = list(range(40))
ROOT = Path(__file__).resolve().parents[3]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await work

    asyncio.run(limited())


@asynccontextmanager
async def far(path: Path, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine in processes; nothing of it is left afterwards."""
    engine = AsyncEngine(EngineConfig(model=str(path)), in_processes(loader=LOADER, **options))
    await engine.start()
    children, directory = processes(engine).children, processes(engine)._directory
    try:
        await until(lambda: engine.status().state != "loading")
        yield engine
    finally:
        await engine.close()
    assert all(child.returncode is not None for child in children.values())
    assert not Path(directory).exists()


def processes(engine: AsyncEngine) -> Processes:
    backend = engine._backend
    assert isinstance(backend, Processes)
    return backend


def ask(prompt: Any, **params: Any) -> GenerateRequest:
    """Ends as `complete` does: the fake model's end-of-text token is none of the tokenizer's."""
    stop = (*params.pop("stop_token_ids", ()), *(() if params.get("ignore_eos") else (EOS,)))
    return GenerateRequest(request_id="r", prompt=prompt, params=SamplingParams(
        **{"max_tokens": 6, **params, "stop_token_ids": stop}))


async def tokens(stream: Stream) -> list[int]:
    return [token async for event in stream if isinstance(event, TokenEvent)
            for token in event.token_ids]


async def is_empty(engine: AsyncEngine) -> None:
    """No block is held any more, and the engine goes on."""
    await until(lambda: engine.status().num_used_tokens == 0 == engine.status().num_running)
    assert await tokens(await engine.add(ask([3, 3, 3]))) == \
        complete([3, 3, 3], SamplingParams(max_tokens=6))


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_in_flight", "burst_s"), [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1)])
def test_answers_do_not_depend_on_run_ahead(
    tmp_path: Path, max_in_flight: int, burst_s: float,
) -> None:
    """Many end early by an end-of-text token: what was computed past it never shows."""
    rng = random.Random(3)
    prompts = [[rng.randrange(50) for _ in range(rng.randrange(1, 40))] for _ in range(24)]
    params = SamplingParams(max_tokens=20, stop_token_ids=(7, 8))
    wanted = [complete(prompt, params) for prompt in prompts]
    assert sum(len(output) < 20 for output in wanted) > 8

    async def work() -> None:
        model = write_model(tmp_path, burst_s=burst_s)
        async with far(model, max_in_flight=max_in_flight) as engine:
            streams = [await engine.add(ask(prompt, max_tokens=20, stop_token_ids=(7, 8)))
                       for prompt in prompts]
            assert await asyncio.gather(*map(tokens, streams)) == wanted
            await is_empty(engine)

    run(work())
    ahead = sum(row[2] for step in steps(tmp_path) for row in step)
    computed = sum(row[1] for step in steps(tmp_path) for row in step)
    needed = sum(len(prompt) + len(output) - 1 for prompt, output in
                 zip([*prompts, [3, 3, 3]],
                     [*wanted, complete([3, 3, 3], SamplingParams(max_tokens=6))], strict=True))
    if max_in_flight == 1:  # the baseline, without bursts either
        assert ahead == 0 and computed <= needed  # cached prefixes are not computed again
    else:
        assert ahead > (10 if burst_s else 100)


def test_overrun_is_bounded_and_never_seen(tmp_path: Path) -> None:
    prompt = next(p for p in ([1, n] for n in range(1000))
                  if len(complete(p, SamplingParams(max_tokens=30))) == 5)

    async def work() -> None:
        async with far(write_model(tmp_path)) as engine:
            events = [event async for event in await engine.add(ask(prompt, max_tokens=30))]
            last = events[-1]
            assert isinstance(last, TokenEvent) and last.output is not None
            assert last.finish_reason == "stop"
            assert last.output.token_ids == tuple(complete(prompt, SamplingParams(max_tokens=30)))
            await until(lambda: engine.status().num_used_tokens == 0)

    run(work())
    found = [step[0][1] for step in steps(tmp_path)]
    assert found[:5] == [2, 1, 1, 1, 1] and len(found) < 5 + MAX_SHORT_STEPS


def test_progress_comes_before_the_first_step_ends(tmp_path: Path) -> None:
    async def work() -> None:
        async with far(write_model(tmp_path)) as engine:
            await tokens(await engine.add(ask(LONG)))
            await until(lambda: engine.status().num_running == 0)
            (tmp_path / "hold").touch()
            stream = await engine.add(ask(LONG))
            events = [await anext(stream), await anext(stream)]
            assert [e.num_prefilled_tokens for e in events if isinstance(e, Progress)] == [0, 36]
            status = engine.status()
            assert (status.num_running, status.num_used_tokens) == (1, 48)
            (tmp_path / "hold").unlink()
            await tokens(stream)

    run(work())


def test_nobody_waits_while_a_grammar_is_compiled(tmp_path: Path) -> None:
    """It is compiled before its request is handed in."""
    schema, other = '{"type": "integer"}', '{"type": "boolean"}'
    wanted = complete([3, 3], SamplingParams(max_tokens=6))

    async def work() -> None:
        async with far(write_model(tmp_path)) as engine:
            (tmp_path / "hold-grammars").touch()
            guided = [asyncio.create_task(engine.add(ask([3, 3], json_schema=schema)))
                      for _ in range(3)]
            await until((tmp_path / "prepared.log").exists)
            later = asyncio.create_task(engine.add(ask([3, 3], json_schema=other)))
            await is_empty(engine)
            assert not any(task.done() for task in [*guided, later])
            guided[0].cancel()
            (tmp_path / "hold-grammars").unlink()
            for task in [*guided[1:], later]:
                assert await tokens(await task) == wanted
            assert set((tmp_path / "prepared.log").read_text().split("\n")) == {schema, other, ""}
            assert guided[0].cancelled()
            assert await tokens(await engine.add(ask([3, 3], json_schema=schema))) == wanted
            # whoever waits when the engine dies is told so
            (tmp_path / "hold-grammars").touch()
            before = (tmp_path / "prepared.log").read_text()
            last = asyncio.create_task(engine.add(ask([3, 3], json_schema=other)))
            await until(lambda: (tmp_path / "prepared.log").read_text() != before)
            processes(engine).children["runner"].kill()
            with pytest.raises(EngineUnavailableError, match="SIGKILL"):
                await last

    run(work())


def test_a_slow_reader_holds_up_nobody(tmp_path: Path) -> None:
    async def work() -> None:
        async with far(write_model(tmp_path)) as engine:
            slow = await engine.add(ask([1], max_tokens=60, ignore_eos=True))
            fast = [await tokens(await engine.add(ask([n]))) for n in range(2, 6)]
            assert fast == [complete([n], SamplingParams(max_tokens=6)) for n in range(2, 6)]
            await until(lambda: engine.status().num_running == 0)
            assert len(slow._channel.completion.events) <= MAX_UNREAD
            assert await tokens(slow) == \
                complete([1], SamplingParams(max_tokens=60, ignore_eos=True))

    run(work())


# -- cancelling ------------------------------------------------------------------------------------


def test_cancelled_in_every_state(tmp_path: Path) -> None:
    async def work() -> None:
        async with far(write_model(tmp_path)) as engine:
            # while it waits for blocks, and in the middle of a prefill
            (tmp_path / "hold").touch()
            prefilling = [await engine.add(ask([n] * 40, max_tokens=20)) for n in (1, 2)]
            await until(lambda: len(steps(tmp_path)) == 1)
            waiting = await engine.add(ask([3] * 40, max_tokens=20))
            # The second one is running too if it came before the step began, else it still waits.
            await until(lambda: engine.status().num_waiting + engine.status().num_running == 3)
            assert engine.status().num_waiting in (1, 2)
            for stream in (waiting, *prefilling):
                await stream.aclose()
            (tmp_path / "hold").unlink()
            await is_empty(engine)
            computed = sum(row[1] for step in steps(tmp_path) for row in step
                           if row[0] in ("r/0", "r/1", "r/2"))
            # the step that had begun, and the one that was queued behind it since it is so short
            assert computed <= 2 * 2 * CHUNK
            # while it decodes, with steps in flight
            stream = await engine.add(ask([4, 4], max_tokens=60, ignore_eos=True))
            while not isinstance(await anext(stream), TokenEvent):
                pass
            await stream.aclose()
            await is_empty(engine)
            # after the end
            stream = await engine.add(ask([5]))
            await tokens(stream)
            await stream.aclose()
            await is_empty(engine)

    run(work())


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["scheduler", "runner"])
def test_a_killed_process_ends_every_stream(tmp_path: Path, role: str) -> None:
    async def work() -> None:
        async with far(write_model(tmp_path)) as engine:
            (tmp_path / "hold").touch()
            streams = [await engine.add(ask(LONG, max_tokens=20)) for _ in range(4)]
            await until(lambda: len(steps(tmp_path)) == 1)
            processes(engine).children[role].kill()
            begin_s = time.monotonic()
            for stream in streams:
                with pytest.raises(EngineUnavailableError, match=f"the {role} process was killed "
                                   "by SIGKILL"):
                    await tokens(stream)
            assert time.monotonic() - begin_s < 3
            assert engine.status().state == "dead"
            with pytest.raises(EngineUnavailableError):
                await engine.add(ask([1]))

    run(work())


def test_a_failing_step_is_explained(tmp_path: Path) -> None:
    async def work() -> None:
        async with far(write_model(tmp_path)) as engine:
            (tmp_path / "steps.log").mkdir()  # the runner cannot write there
            with pytest.raises(EngineUnavailableError, match="IsADirectoryError"):
                await tokens(await engine.add(ask([1])))
            assert not engine.status().is_mendable

    run(work())


def test_a_failed_load_is_explained(tmp_path: Path) -> None:
    async def work() -> None:
        async with far(write_model(tmp_path, error="no weights\nthere")) as engine:
            status = engine.status()
            assert (status.state, status.reason) == ("dead", "no weights there")
            assert status.is_mendable

    run(work())


def test_signals_for_everybody_do_not_end_the_children(tmp_path: Path) -> None:
    async def work() -> None:
        async with far(write_model(tmp_path)) as engine:
            for child in processes(engine).children.values():
                child.send_signal(signal.SIGINT)
                child.send_signal(signal.SIGTERM)
            await is_empty(engine)

    run(work())


def test_garbage_on_every_socket(tmp_path: Path) -> None:
    """Frames that are no message, messages that are not for this inbox, results nobody waits for,
    and bytes that are not even ZeroMQ's."""
    stale = StepResult(step_id=0, epoch=7, token_ids=(1,))
    frames = [b"", b"\x00", b"\xc1" * 99, b"\x91" * 99_999, random.Random(1).randbytes(5000),
              encode(Loaded()) + b"x", encode(stale), b"\x93\xa3Add\xff\xff",
              encode(Stepped(slices=(), result=stale, started_s=0.0, finished_s=0.0))[:-3]]

    async def work() -> None:
        async with far(write_model(tmp_path)) as engine:
            directory = Path(processes(engine)._directory)
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            inboxes = sorted(directory.iterdir())
            assert [inbox.name for inbox in inboxes] == [
                "front", "grammars", "runner", "scheduler"]
            with zmq.Context() as context:
                for inbox in inboxes:
                    with context.socket(zmq.PUSH) as out:
                        out.connect(f"ipc://{inbox}")
                        for frame in frames:
                            out.send(frame)
                        out.send_multipart([b"a", b"b"])
                    with socket.socket(socket.AF_UNIX) as raw:
                        raw.connect(str(inbox))
                        raw.send(b"GET / HTTP/1.1\r\n\r\n" * 100)
                await is_empty(engine)
            assert await tokens(await engine.add(ask(LONG))) == \
                complete(LONG, SamplingParams(max_tokens=6))
            await is_empty(engine)

    run(work())


PARENT = """
import asyncio, json
from longspan.config import EngineConfig
from longspan.engine.front.client import AsyncEngine
from longspan.engine.processes.launch import in_processes

async def main():
    engine = AsyncEngine(EngineConfig(model={path!r}), in_processes(loader={loader!r}))
    await engine.start()
    while engine.status().state == "loading":
        await asyncio.sleep(0.01)
    backend = engine._backend
    print(json.dumps([backend._directory, *(c.pid for c in backend.children.values())]), flush=True)
    {then}

asyncio.run(main())
"""


@pytest.mark.parametrize(("then", "how"), [
    ("await asyncio.sleep(60)", signal.SIGKILL), ("pass", None)], ids=["killed", "returns"])
def test_children_do_not_survive_their_parent(
    tmp_path: Path, then: str, how: signal.Signals | None,
) -> None:
    code = PARENT.format(path=str(write_model(tmp_path)), loader=LOADER, then=then)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT,
                          text=True) as parent:
        assert parent.stdout is not None
        directory, *children = json.loads(parent.stdout.readline())
        if how is not None:
            assert all(map(psutil.pid_exists, children)) and os.path.isdir(directory)
            parent.send_signal(how)
        parent.wait(10)
        end_s = time.monotonic() + 5
        while any(map(is_alive, children)) or os.path.exists(directory):
            assert time.monotonic() < end_s, "orphans"
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def obstruct(monkeypatch: pytest.MonkeyPatch, directory: Path, socket_name: str) -> None:
    """Sockets go into this directory, where one of them finds its place taken by a folder."""
    directory.mkdir()
    make = tempfile.mkdtemp

    def obstructed(**options: Any) -> str:
        path = make(**{**options, "dir": str(directory)})
        os.mkdir(f"{path}/{socket_name}")
        return path

    monkeypatch.setattr("tempfile.mkdtemp", obstructed)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Sockets fit in."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def test_a_socket_that_cannot_be_bound(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    obstruct(monkeypatch, short_path / "sockets", "front")
    children = psutil.Process().children()

    async def work() -> None:
        engine = AsyncEngine(EngineConfig(model=str(short_path)), in_processes(loader=LOADER))
        with pytest.raises(LongspanError, match="front: Address already in use; free .* TMPDIR"):
            await engine.start()
        await engine.close()

    run(work())
    assert not list((short_path / "sockets").iterdir()) and psutil.Process().children() == children


@pytest.mark.parametrize("role", ["scheduler", "runner"])
def test_a_childs_socket_that_cannot_be_bound(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, role: str,
) -> None:
    obstruct(monkeypatch, short_path / "sockets", role)
    (short_path / "model").mkdir()

    async def work() -> None:
        async with far(write_model(short_path / "model")) as engine:
            status = engine.status()
            assert status.state == "dead" and status.is_mendable, status
            assert f"{role}: Address already in use; free" in status.reason

    run(work())


def test_no_directory_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(LongspanError, match=rf"No such file or directory \({tmp_path}/gone\); "
                                            "free some space, or name a directory .* TMPDIR"):
        private_directory()


def test_an_infinite_budget_reaches_the_children(tmp_path: Path) -> None:
    """It means none; what became of it would be the default."""
    async def work() -> None:
        config = EngineConfig(model=str(write_model(tmp_path)), step_budget_s=float("inf"))
        engine = AsyncEngine(config, in_processes(loader=LOADER))
        await engine.start()
        try:
            await until(lambda: engine.status().state != "loading")
        finally:
            await engine.close()
        assert json.loads((tmp_path / "asked.json").read_text())["step_budget_s"] == "inf"

    run(work())


def test_a_long_name_of_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    found = private_directory()
    os.rmdir(found)
    assert len(found) < 60 and not list(long.iterdir())
