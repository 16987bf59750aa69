"""Blocks in host memory and on disk, seen from `LLM`: the same answers, from wherever they come."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.attention.sparsity import SparsityPlan
from longspan.engine.device import block_files
from longspan.engine.front.llm import LLM
from longspan.engine.kv_file import LOCK
from longspan.engine.request import Progress, RequestOutput, SamplingParams
from longspan.errors import LongspanError
from longspan.units import GIB
from tests.doubles import EXPERTS, write_checkpoint

LENGTH, ANSWER = 2_400, 6
GREEDY = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "max_model_len": LENGTH + 64, "block_size": 16, "prefill_chunk_len": 256, "device": "cpu",
    "num_threads": 1}
HOST: dict[str, Any] = {"kv_host_gib": 0.02}
REUSABLE = (LENGTH - 1) // 16 * 16
"""Tokens of a known document that are not computed again."""
REUSABLE_BY = {"dense": REUSABLE, "sparse": (LENGTH - 1) // 256 * 256}
"""The same by attention: of a sparse prompt whole prefill chunks are shared."""


def document(seed: int, length: int = LENGTH) -> list[int]:
    """Tokens of a text."""
    rng = random.Random(seed)
    return [rng.randrange(200) for _ in range(length)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    return str(write_checkpoint(path, max_position_embeddings=16_384))


@pytest.fixture(scope="module")
def alone(checkpoint: str) -> Iterator[dict[tuple[str, int], tuple[int, ...]]]:
    """Answers without any cache, by attention and document."""
    found = dict[tuple[str, int], tuple[int, ...]]()
    for attention in ("dense", "sparse"):
        for seed in (1, 2):
            with LLM(checkpoint, attention=attention, **OPTIONS) as llm:
                found[attention, seed] = ask(llm, seed).token_ids
    yield found


def small_pool(checkpoint: str, attention: str = "dense", **options: Any) -> LLM:
    """An engine whose device holds one document and a little."""
    kv_dtype = options.get("kv_dtype")
    with LLM(checkpoint, attention=attention, kv_dtype=kv_dtype, **OPTIONS) as llm:
        memory = llm.memory
    needed = memory.weights_bytes + memory.workspace_bytes + 1.1 * memory.context_bytes
    llm = LLM(checkpoint, attention=attention, memory_gib=needed / GIB, **OPTIONS, **options)
    assert LENGTH < llm.memory.num_blocks * 16 < 1.3 * LENGTH
    return llm


def ask(llm: LLM, seed: int) -> RequestOutput:
    return llm.generate(document(seed), GREEDY)[0]


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("places", ["none", "host", "disk", "both"])
def test_two_documents_in_turn_on_a_pool_that_holds_one(
    checkpoint: str, alone: dict[tuple[str, int], tuple[int, ...]], tmp_path: Path,
    attention: str, places: str,
) -> None:
    options = HOST if places in ("host", "both") else {}
    if places in ("disk", "both"):
        options = {**options, "kv_dir": str(tmp_path)}
    with small_pool(checkpoint, attention, **options) as llm:
        for turn in range(3):
            for seed in (1, 2):
                output = ask(llm, seed)
                assert output.token_ids == alone[attention, seed], (turn, seed)
                is_back = turn > 0 and places != "none"
                assert (output.num_cached_tokens >= REUSABLE_BY[attention]) == is_back
        assert llm.stats().num_requests == 6


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_answers_are_the_same_after_a_restart(
    checkpoint: str, alone: dict[tuple[str, int], tuple[int, ...]], tmp_path: Path, attention: str,
) -> None:
    for turn in range(2):
        with LLM(checkpoint, attention=attention, kv_dir=str(tmp_path), **OPTIONS) as llm:
            outputs = llm.generate([document(1), document(2)], GREEDY)
        assert [output.token_ids for output in outputs] == [alone[attention, 1],
                                                            alone[attention, 2]]
        assert all((o.num_cached_tokens >= REUSABLE_BY[attention]) == bool(turn) for o in outputs)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_other_chunk_plans_use_what_is_the_same_for_them(
    checkpoint: str, tmp_path: Path, attention: str,
) -> None:
    """Dense blocks are, whatever the chunks were; a sparse prompt's depend on them."""
    options = {**OPTIONS, "attention": attention}
    for chunk_len in (256, 512, 160):
        mine = {**options, "prefill_chunk_len": chunk_len}
        with LLM(checkpoint, **mine) as llm:
            wanted = ask(llm, 1).token_ids
        with LLM(checkpoint, kv_dir=str(tmp_path), **mine) as llm:
            output = ask(llm, 1)
        assert output.token_ids == wanted, chunk_len
        is_known = attention == "dense" and chunk_len != 256
        assert output.num_cached_tokens == REUSABLE * is_known, chunk_len


def test_int8_blocks_come_back_from_everywhere(checkpoint: str, tmp_path: Path) -> None:
    """Their scales and means with them: the answers of an engine alone, not those in full
    precision's blocks, whose key is another."""
    int8: dict[str, Any] = {"kv_dtype": "int8"}
    for attention in ("dense", "sparse"):
        with LLM(checkpoint, attention=attention, **OPTIONS, **int8) as llm:
            wanted = {seed: ask(llm, seed).token_ids for seed in (1, 2)}
            assert ask(llm, 1).token_ids == wanted[1]  # behind its own prefix
        with LLM(checkpoint, attention=attention, kv_dir=str(tmp_path), **OPTIONS) as llm:
            ask(llm, 1)
        for turn in range(2):
            with small_pool(checkpoint, attention, kv_dir=str(tmp_path), **HOST, **int8) as llm:
                for seed in (1, 2, 1):
                    output = ask(llm, seed)
                    assert output.token_ids == wanted[seed], (attention, turn, seed)
                    if not turn and seed == 2:
                        assert not output.num_cached_tokens
                assert output.num_cached_tokens > 0.9 * REUSABLE


@pytest.mark.parametrize(("dtype", "config"), [("float32", EXPERTS), ("bfloat16", {})],
                         ids=["experts", "bfloat16"])
def test_experts_and_bfloat16_come_back_from_disk(
    dtype: str, config: dict[str, Any], tmp_path: Path,
) -> None:
    path = str(write_checkpoint(tmp_path / "model", max_position_embeddings=16_384, **config))
    options = {**OPTIONS, "kv_dir": str(tmp_path / "kv"), "dtype": dtype}
    with LLM(path, **options) as llm:
        first = ask(llm, 1)
    with LLM(path, **options) as llm:
        again = ask(llm, 1)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, REUSABLE)
    assert again.token_ids == first.token_ids


def test_int8_blocks_take_a_quarter_and_their_scales(checkpoint: str) -> None:
    with LLM(checkpoint, **OPTIONS) as llm:
        plain, model = llm.memory.kv_bytes_per_token, llm.model_config
    with LLM(checkpoint, kv_dtype="int8", **OPTIONS) as llm:
        heads = 2 * model.num_layers * model.num_kv_heads
        means = plain - 4 * model.kv_elements_per_token
        assert llm.memory.kv_bytes_per_token == model.kv_elements_per_token + 4 * heads + means
    with pytest.raises(LongspanError, match="kv_dtype 'fp8' is not one of int8, bf"):
        LLM(checkpoint, kv_dtype="fp8", **OPTIONS)


def test_prefixes_mix_device_host_and_disk(checkpoint: str, tmp_path: Path) -> None:
    """A known beginning on the disk, more of it in host memory, and a batch that shares it."""
    first, last = document(7, 1_200), document(8, 1_100)
    prompts = [first[:600], first, first + last, first + last[:500] + document(9, 300)]
    with LLM(checkpoint, **OPTIONS) as llm:
        wanted = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    for kv in ({}, HOST, HOST):
        with small_pool(checkpoint, kv_dir=str(tmp_path), **kv) as llm:
            for index in (1, 3, 2, 0, 3):
                assert llm.generate(prompts[index], GREEDY)[0].token_ids == wanted[index]
                ask(llm, 2)
            outputs = llm.generate(prompts, GREEDY)
            assert [output.token_ids for output in outputs] == wanted
            assert sum(output.num_cached_tokens for output in outputs) > 3_000


@pytest.mark.parametrize("change", [
    {"attention": "sparse"}, {"dtype": "bfloat16"},
    {"block_size": 32, "prefill_chunk_len": 256}], ids=str)
def test_other_engines_blocks_are_never_used(
    checkpoint: str, tmp_path: Path, change: dict[str, Any],
) -> None:
    with LLM(checkpoint, kv_dir=str(tmp_path), **{"attention": "dense", **OPTIONS}) as llm:
        ask(llm, 1)
    with LLM(checkpoint, kv_dir=str(tmp_path),
             **{"attention": "dense", **OPTIONS, **change}) as llm:
        assert ask(llm, 1).num_cached_tokens == 0
    with LLM(checkpoint, kv_dir=str(tmp_path), **{"attention": "dense", **OPTIONS}) as llm:
        assert ask(llm, 1).num_cached_tokens > 0, "both are kept"


def test_a_folder_belongs_to_one_engine(checkpoint: str, tmp_path: Path) -> None:
    with (LLM(checkpoint, kv_dir=str(tmp_path), **OPTIONS),
          pytest.raises(LongspanError, match="is in use by process")):
        LLM(checkpoint, kv_dir=str(tmp_path), **OPTIONS)
    LLM(checkpoint, kv_dir=str(tmp_path), **OPTIONS).close()


def test_a_folder_that_cannot_be_written_is_one_line(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/kv")):
        with pytest.raises(LongspanError, match="name a directory that this user may write"):
            LLM(checkpoint, kv_dir=str(folder), **OPTIONS)


def test_host_memory_that_is_not_there_is_refused(checkpoint: str) -> None:
    with pytest.raises(LongspanError, match="lower kv_host_gib"):
        LLM(checkpoint, kv_host_gib=1e6, **OPTIONS)
    with pytest.raises(LongspanError, match="kv_host_gib 1e-06 holds 0 blocks"):
        LLM(checkpoint, kv_host_gib=1e-6, **OPTIONS)


def test_a_disk_that_makes_no_sense_is_one_line(
    checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(LongspanError, match="kv_disk_gib 1e-06 holds 0 blocks of .* or leave it"):
        LLM(checkpoint, kv_dir=str(tmp_path), kv_disk_gib=1e-6, **OPTIONS)
    for nowhere in ("", " "):
        with pytest.raises(LongspanError, match="kv_dir is empty; name a directory"):
            LLM(checkpoint, kv_dir=nowhere, **OPTIONS)
    LLM(checkpoint, kv_dir=str(tmp_path), kv_disk_gib=1e6, **OPTIONS).close()
    assert caplog.text.count("kv_disk_gib 1e+06 is more than the ") == 1


def corrupt(folder: Path, how: str) -> None:
    """Damage every file of blocks in a folder."""
    files = list(folder.glob("*.safetensors"))
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        if how == "flipped":
            content[len(content) // 2] ^= 16
        elif how == "truncated":
            del content[-100:]
        elif how == "foreign":
            content[:] = b"something else" * 1000
        file.write_bytes(content)
        if how == "gone":
            file.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "foreign", "gone"])
@pytest.mark.parametrize("when", ["before the start", "while it runs"])
def test_damaged_files_are_computed_again(
    checkpoint: str, alone: dict[tuple[str, int], tuple[int, ...]], tmp_path: Path, how: str,
    when: str, caplog: pytest.LogCaptureFixture,
) -> None:
    options = {**OPTIONS, "kv_dir": str(tmp_path), "attention": "dense"}
    with LLM(checkpoint, **options) as llm:
        ask(llm, 1)
    if when == "before the start":
        corrupt(tmp_path, how)
    with LLM(checkpoint, **options) as llm:
        if when == "while it runs":
            corrupt(tmp_path, how)
        output = ask(llm, 1)
        assert output.token_ids == alone["dense", 1]
        assert output.num_cached_tokens == 0
    known_before = when == "while it runs" or how == "flipped"
    assert ("cannot be used" in caplog.text) == known_before
    with LLM(checkpoint, **options) as llm:
        assert ask(llm, 1).num_cached_tokens == REUSABLE, "it was written anew"


def test_engines_that_are_killed_leave_no_wrong_answer(checkpoint: str, tmp_path: Path) -> None:
    """At random moments: while they compute, write, delete and read."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.front.kv_killed", checkpoint, str(tmp_path / "kv"),
         "4", "5"], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout + done.stderr
    *counts, _ = done.stdout.splitlines()
    assert len(counts) == 4 and sum(map(int, counts)) > 2, "what was whole is used"


def test_other_weights_tokenizers_and_templates_under_the_same_name(tmp_path: Path) -> None:
    path, folder = tmp_path / "model", tmp_path / "kv"
    rope = {"max_position_embeddings": 16_384}

    def cached() -> int:
        with LLM(str(path), kv_dir=str(folder), **OPTIONS) as llm:
            return ask(llm, 1).num_cached_tokens

    write_checkpoint(path, **rope)
    assert (cached(), cached()) == (0, REUSABLE)
    times = (path / "model.safetensors").stat()
    write_checkpoint(path, seed=1, **rope)
    os.utime(path / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cached() == 0, "other weights, of the same size and date"
    write_checkpoint(path, rope_theta=20_000.0, **rope)
    assert cached() == 0, "other positions"
    write_checkpoint(path, **rope)
    assert cached() == REUSABLE
    tokenizer = path / "tokenizer_config.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("unknown role", "no such role"))
    assert cached() == 0, "another template"
    tokenizer.write_text(text)
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + " ")
    assert cached() == 0, "another tokenizer"


def test_the_folder_does_not_grow_beyond_its_limit(checkpoint: str, tmp_path: Path) -> None:
    size = 1.3e6 / GIB  # one document takes 1.2 MB
    mine = tmp_path / "mine.safetensors"
    mine.write_text("not yours")
    for kv_disk_gib in (2 * size, 1.2 * size):
        with LLM(checkpoint, kv_dir=str(tmp_path), kv_disk_gib=kv_disk_gib, **OPTIONS) as llm:
            for seed in range(5):
                ask(llm, seed)
                used = sum(file.stat().st_size for file in tmp_path.glob("*-*"))
                assert 0 < used <= kv_disk_gib * GIB
            assert ask(llm, 4).num_cached_tokens == REUSABLE
    assert mine.read_text() == "not yours"


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_a_cancelled_prefill_goes_on_from_its_finished_chunks(
    checkpoint: str, alone: dict[tuple[str, int], tuple[int, ...]], attention: str,
) -> None:
    with LLM(checkpoint, attention=attention, step_budget_s=1e-3, **OPTIONS) as llm:
        num_done = 0
        while num_done < 900:
            stream = llm.stream(document(1), GREEDY)
            for event in stream:
                assert isinstance(event, Progress), "it ends before the first token"
                if event.num_prefilled_tokens >= num_done + 300:
                    num_done = event.num_prefilled_tokens
                    break
            stream.close()  # type: ignore[attr-defined]
        output = ask(llm, 1)
        assert output.token_ids == alone[attention, 1]
        assert output.num_cached_tokens >= num_done - num_done % 256


def test_a_full_disk_costs_nothing_but_the_files(
    checkpoint: str, alone: dict[tuple[str, int], tuple[int, ...]], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The limit of a file's size stands for the disk's: the same system calls fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with small_pool(checkpoint, kv_dir=str(tmp_path), **HOST) as llm:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            for seed in (1, 2, 1):
                output = ask(llm, seed)
                assert output.token_ids == alone["dense", seed]
            assert output.num_cached_tokens >= REUSABLE, "host memory has it all the same"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert 0 < caplog.text.count("cannot be written") < 10
        assert [item.name for item in tmp_path.iterdir()] == [LOCK]
        for seed in (3, 4, 5, 6):
            ask(llm, seed)
        assert list(tmp_path.glob("*.safetensors")), "it goes on when there is room"


def test_the_newest_documents_stay_on_a_disk_that_others_have_filled(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_all, num_bytes = block_files._write_all, 2_600_000  # two documents

    def write(fd: int, data: memoryview, offset: int) -> None:
        used = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        if used + offset + len(data) > num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(fd, data, offset)

    monkeypatch.setattr(block_files, "_write_all", write)
    options = {**OPTIONS, "kv_dir": str(tmp_path), "kv_disk_gib": 1.0}
    with LLM(checkpoint, **options) as llm:
        for seed in range(8):
            ask(llm, seed)
    with LLM(checkpoint, **options) as llm:
        assert [ask(llm, seed).num_cached_tokens for seed in (7, 6, 0)] == [REUSABLE, REUSABLE, 0]


def test_another_plan_and_another_release_never_use_the_files(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cached(name: str) -> int:
        plan = tmp_path / f"{name}.json"
        replace(SparsityPlan.default(3, 4), num_scouts=3 if name == "other" else 256).save(plan)
        with LLM(checkpoint, attention="sparse", sparsity_plan=str(plan),
                 kv_dir=str(tmp_path / "kv"), **OPTIONS) as llm:
            return ask(llm, 1).num_cached_tokens

    assert cached("default") == 0 and cached("default") > 2_000
    assert cached("other") == 0
    monkeypatch.setattr("longspan.engine.setup.cache_key.__version__", "0.0.9")
    assert cached("default") == 0
    monkeypatch.undo()
    assert cached("default") > 2_000


def test_where_a_prefix_came_from_is_told(checkpoint: str, tmp_path: Path) -> None:
    with LLM(checkpoint, kv_dir=str(tmp_path), **OPTIONS) as llm:
        assert ask(llm, 1).prefix_origin is None
        assert ask(llm, 1).prefix_origin is None, "all of it was on the device"
    with small_pool(checkpoint, kv_dir=str(tmp_path), **HOST) as llm:
        origin = ask(llm, 1).prefix_origin
        assert origin is not None and origin.load_s > 0
        assert (origin.num_disk_tokens, origin.num_host_tokens) == (REUSABLE, 0)
        ask(llm, 2)
        origin = ask(llm, 1).prefix_origin
        assert origin is not None and origin.num_host_tokens > REUSABLE / 2
        assert origin.num_disk_tokens == 0
