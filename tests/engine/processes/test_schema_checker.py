"""Schemas that want to do harm: each has its answer within bounds, and nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest

import longspan
from longspan.bench.server.hostile_schemas import HOSTILE
from longspan.engine.processes import schema_checker
from longspan.engine.processes.schema_checker import MAX_COMPILE_BYTES, MAX_COMPILE_S, SchemaChecker
from longspan.engine.text.grammar import Grammars
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import InvalidRequestError
from tests.doubles import write_tokenizer

NANO, VOCAB_SIZE = Path(longspan.__file__).parent / "nano", 4096
PERSON = json.dumps({"type": "object", "properties": {"name": {"type": "string"}}})


@asynccontextmanager
async def checking(path: Path = NANO) -> AsyncIterator[SchemaChecker]:
    checker = SchemaChecker(path, VOCAB_SIZE)
    try:
        yield checker
    finally:
        checker.close()


def forks(checker: SchemaChecker) -> list[psutil.Process]:
    assert checker._child is not None
    return psutil.Process(checker._child.pid).children()


async def until_none(checker: SchemaChecker) -> None:
    async with asyncio.timeout(MAX_COMPILE_S / 2):  # before they would have ended by themselves
        while forks(checker):
            await asyncio.sleep(0.01)


async def verdict(checker: SchemaChecker, schema: str) -> str:
    try:
        await checker.check(schema)
    except InvalidRequestError as error:
        return str(error)
    return ""


@pytest.mark.alone
def test_hostile_schemas_are_answered_within_bounds() -> None:
    async def run() -> list[str]:
        lags, sizes = [0.0], [0]

        async def watch(checker: SchemaChecker) -> None:
            own = psutil.Process(checker._child.pid).memory_info().rss
            while True:
                before_s = time.monotonic()
                await asyncio.sleep(0.01)
                lags.append(time.monotonic() - before_s - 0.01)
                with suppress(psutil.NoSuchProcess):
                    sizes.extend(fork.memory_info().rss - own for fork in forks(checker))

        async with checking() as checker:
            await checker.check(PERSON)
            watcher = asyncio.create_task(watch(checker))
            async with asyncio.timeout(len(HOSTILE) * 2 * MAX_COMPILE_S):
                found = await asyncio.gather(*(verdict(checker, each) for each in HOSTILE))
            watcher.cancel()
            assert max(lags) < 0.3
            assert max(sizes) < MAX_COMPILE_BYTES
            await until_none(checker)
        return found

    assert len(set(HOSTILE)) >= 50 and max(map(len, HOSTILE)) <= 65_536
    found = asyncio.run(run())
    assert all("\n" not in message and len(message) < 400 for message in found)
    assert any("0.5 s of processor time" in message for message in found)
    assert any("256 MiB of memory" in message for message in found)
    grammars = Grammars(Tokenizer(NANO), VOCAB_SIZE)
    grammars.load()
    accepted = [schema for schema, message in zip(HOSTILE, found, strict=True) if not message]
    assert len(accepted) >= 15
    for schema in accepted:  # as the runner does: at the same price
        before_s = time.process_time()
        grammars.start(schema)
        assert time.process_time() - before_s < 2 * MAX_COMPILE_S


def test_verdicts_are_the_compilers() -> None:
    schemas = [PERSON, "{", '{"type": "objekt"}', '{"not": {}}', '{"$ref": "#/nowhere"}', '"a"']
    grammars = Grammars(Tokenizer(NANO), VOCAB_SIZE)

    async def run() -> list[str]:
        async with checking() as checker:
            return [await verdict(checker, schema) for schema in [*schemas, *schemas]]

    def compiled(schema: str) -> str:
        try:
            grammars.check(schema)
        except InvalidRequestError as error:
            return str(error)
        return ""

    assert asyncio.run(run()) == [compiled(schema) for schema in schemas] * 2
    assert compiled(PERSON) == "" != compiled("{")


def test_a_cancelled_check_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = json.dumps({"type": "integer", "multipleOf": 9_999_991})
    monkeypatch.setattr(schema_checker, "NUM_AT_ONCE", 1)

    async def run() -> None:
        async with checking() as checker:
            first = asyncio.create_task(checker.check(bomb))  # while the child starts
            await asyncio.sleep(0.01)
            first.cancel()
            await checker.check(PERSON)
            second = asyncio.create_task(checker.check(bomb))
            waiting = asyncio.create_task(checker.check(bomb + " "))
            while not forks(checker):
                await asyncio.sleep(0.01)
            second.cancel()
            waiting.cancel()
            async with asyncio.timeout(MAX_COMPILE_S / 2):
                await checker.check(PERSON + " ")  # in the only place there is
            await until_none(checker)
            assert second.cancelled() and waiting.cancelled()
            assert "processor time" in await verdict(checker, bomb)  # no verdict was kept

    asyncio.run(run())


def test_a_child_that_died_is_started_again() -> None:
    async def run() -> None:
        async with checking() as checker:
            await checker.check(PERSON)
            first = checker._child
            assert first is not None
            first.kill()
            first.wait()
            await checker.check(PERSON + " ")
            second = checker._child
            assert second is not None and second.pid != first.pid
        assert second.poll() is not None

    asyncio.run(run())


def test_what_the_checkpoint_lacks_is_said_each_time(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")

    async def run() -> None:
        async with checking(tmp_path) as checker:
            for schema in (PERSON, "{}"):
                assert "names no end-of-text token" in await verdict(checker, schema)

    asyncio.run(run())


def test_text_that_is_no_unicode() -> None:
    async def run() -> None:
        async with checking() as checker:
            assert "not valid Unicode" in await verdict(checker, '{"const": "\ud800"}')

    asyncio.run(run())
