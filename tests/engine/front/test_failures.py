"""What fails for one request ends that request alone, with the reason: sampling on the host, and
logits that are not finite numbers."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspan.attention.sparsity import SparsityPlan
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.device.runner import Runner
from longspan.engine.front.llm import LLM
from longspan.engine.intake import Prompt
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.engine.step import (
    NOT_FINITE,
    SamplingExtras,
    ScheduledBatch,
    ScheduledSlice,
    StepResult,
)
from longspan.engine.text.grammar import Grammar, Grammars
from longspan.errors import InvalidRequestError, RequestFailedError
from tests.doubles import DeepTransport, FakeRunner, complete, make_request, write_checkpoint
from tests.engine.control.test_scheduler import CONFIG
from tests.engine.device.test_graph_steps import load as load_runner
from tests.engine.device.test_graph_steps import use_graphs
from tests.engine.device.test_sampling import GREEDY
from tests.engine.front.test_client import run, tiny

SICK = 77
"""The token whose embedding is NaN in `sick`: only requests that have it are affected."""
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS: list[Prompt] = [[5, 6, 7], list(range(90, 150)), [9] * 21]
SCHEMA = '{"type": "object"}'
CAUSE = "sampling has failed for this request (RuntimeError: out of order)"


def poison(
    path: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any,
) -> Path:
    """Change the weights of a checkpoint, whose head is a matrix of its own."""
    write_checkpoint(path, tie_word_embeddings=False, **config)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    change(weights)
    save_file(weights, path / "model.safetensors")
    return path


def poison_embedding(weights: dict[str, torch.Tensor]) -> None:
    """Make one token's embedding NaN."""
    weights["model.embed_tokens.weight"][SICK] = torch.nan


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"device": "cpu", "block_size": 8, "prefill_chunk_len": 32, **options})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poison(tmp_path_factory.mktemp("sick"), poison_embedding)


def side_by_side(llm: LLM, asked: list[tuple[Any, SamplingParams]]) -> list[Any]:
    """Requests that decode together: each one's tokens, or its error."""
    streams = dict(enumerate(llm.stream(prompt, params) for prompt, params in asked))
    results: list[Any] = [None] * len(asked)
    while streams:
        for index, stream in list(streams.items()):
            try:
                output: RequestOutput | None = getattr(next(stream), "output", None)
            except (RequestFailedError, StopIteration) as error:
                results[index] = error if isinstance(error, RequestFailedError) else results[index]
                del streams[index]
                continue
            results[index] = results[index] if output is None else output.token_ids
    return results


# -- sampling on the host --------------------------------------------------------------------------


@pytest.fixture(params=["start", "push", "mask"])
def broken_grammars(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars that raise: when a request begins, with its first token, or with its second."""
    owner = Grammars if request.param == "start" else Grammar
    intact = getattr(owner, request.param)
    num_calls = itertools.count(1)

    def fail(self: object, *args: Any) -> Any:
        if next(num_calls) == 1 and request.param == "mask":
            return intact(self, *args)
        raise RuntimeError("out of\norder")

    monkeypatch.setattr(owner, request.param, fail)


@pytest.mark.usefixtures("broken_grammars")
def test_a_grammar_that_raises_ends_its_request(
    path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    with load(path) as llm:
        alone = [llm.generate([prompt], PARAMS)[0].token_ids for prompt in PROMPTS]
        guided = SamplingParams(max_tokens=12, json_schema=SCHEMA, presence_penalty=0.5, logprobs=1)
        first, *others = side_by_side(
            llm, [("{", guided), *((prompt, PARAMS) for prompt in PROMPTS)])
        assert isinstance(first, RequestFailedError) and str(first) == CAUSE
        assert first.http_status == 500
        assert others == alone
        assert "Traceback" in caplog.text and "out of\norder" in caplog.text
        with pytest.raises(RequestFailedError, match="out of order"):
            llm.generate([PROMPTS[0], "{"], guided)
        assert llm.generate([PROMPTS[0]], PARAMS)[0].token_ids == alone[0]
        llm._loop._scheduler.check()


def test_a_grammar_that_cannot_go_on_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grammar, "mask", lambda _: None)
    prompt = [65] * 8  # fills a block exactly
    with load(path) as llm, pytest.raises(RequestFailedError, match="as its json_schema asks"):
        llm.generate([prompt], SamplingParams(max_tokens=4, json_schema=SCHEMA))


def test_refusals_keep_their_words(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema that the runner cannot compile, though the front end could."""
    def refuse(*_: object) -> Grammar:
        raise InvalidRequestError("json_schema cannot be followed: too deep")

    monkeypatch.setattr(Grammars, "start", refuse)
    with load(path) as llm, pytest.raises(RequestFailedError, match=r"^json_schema .* too deep$"):
        llm.generate(["{"], SamplingParams(max_tokens=4, json_schema=SCHEMA))


@pytest.mark.usefixtures("broken_grammars")
def test_http_tells_the_one_and_answers_the_others(path: Path) -> None:
    free = {"prompt": "Hi", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    guided = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12,
              "response_format": {"type": "json_object"}}

    async def work() -> None:
        async with tiny(path) as (engine, client, _):
            alone = (await client.post("/v1/completions", json=free)).json()["choices"]
            reply = await client.post("/v1/chat/completions", json=guided)
            assert reply.status_code == 500
            assert reply.json()["error"]["message"] == CAUSE
            reply = await client.post("/v1/chat/completions", json={**guided, "stream": True})
            events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
            assert json.loads(events[-1])["error"]["message"] == CAUSE
            assert (await client.post("/v1/completions", json=free)).json()["choices"] == alone
            assert engine.status().state == "ready"

    run(work())


# -- logits that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("fields", [
    {}, {"presence_penalty": 1.0, "repetition_penalty": 1.2}, {"logprobs": 3},
    {"logit_bias": {3: 2.0}, "min_tokens": 2}, {"json_schema": SCHEMA, "ignore_eos": False}],
    ids=str)
def test_others_go_on_beside_a_request_of_nan(
    sick: Path, temperature: float, fields: dict[str, Any],
) -> None:
    params = SamplingParams(**{
        "max_tokens": 12, "temperature": temperature, "seed": 4, "ignore_eos": True,
        "logit_bias": {SICK: -100.0}, **fields})
    with load(sick) as llm:
        alone = [llm.generate([prompt], params)[0].token_ids for prompt in PROMPTS]
        first, *others = side_by_side(
            llm, [([5, SICK], params), *((prompt, params) for prompt in PROMPTS)])
        assert isinstance(first, RequestFailedError) and str(first) == NOT_FINITE
        assert others == alone
        assert [llm.generate([prompt], params)[0].token_ids for prompt in PROMPTS] == alone


def test_a_request_that_becomes_nan_while_it_decodes(sick: Path) -> None:
    """Its own token is the sick one."""
    params = SamplingParams(max_tokens=12, logit_bias=((SICK, 100.0),), ignore_eos=True)
    with load(sick) as llm:
        events = llm.stream([5, 6], params)
        tokens = list[int]()
        with pytest.raises(RequestFailedError, match="not finite numbers"):
            for event in events:
                tokens += getattr(event, "token_ids", ())
        assert tokens == [SICK]


@pytest.mark.parametrize("name", [
    "lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.bias",
    "model.layers.2.mlp.down_proj.weight"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_one_broken_weight(tmp_path: Path, name: str, number: float, attention: str) -> None:
    path = poison(tmp_path, lambda weights: weights[name].view(-1)[5:6].fill_(number))
    plan = tmp_path / "plan.json"
    SparsityPlan.default(3, 4, vertical=8, slash=16).save(plan)
    with load(path, attention=attention, sparsity_plan=str(plan)) as llm:
        for params in (PARAMS, SamplingParams(max_tokens=4, temperature=1.0, top_p=0.9, seed=1)):
            with pytest.raises(RequestFailedError, match="not finite numbers"):
                llm.generate([list(range(100, 250))], params)


def test_http_does_not_send_nonsense(sick: Path) -> None:
    free = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}

    async def work() -> None:
        async with tiny(sick) as (engine, client, _):
            bad = {**free, "prompt": [[5, 6], [5, SICK]]}
            reply = await client.post("/v1/completions", json=bad)
            assert reply.status_code == 500
            assert reply.json()["error"] == {
                "message": NOT_FINITE, "type": "server_error", "param": None, "code": None}
            reply = await client.post("/v1/completions", json={**bad, "stream": True})
            assert NOT_FINITE in reply.text and "[DONE]" not in reply.text
            reply = await client.post("/v1/completions", json={**free, "prompt": [5, 6]})
            assert reply.status_code == 200 and engine.status().state == "ready"

    run(work())


def decode(runner: Runner, extras: SamplingExtras | None, repeats: int) -> list[tuple[int, ...]]:
    """Tokens of three requests, the second of them sick: prompts, then five steps ahead of the
    host."""
    prompts = [[5, 6], [5, SICK], [9] * 21]

    def item(slot: int, step: int) -> ScheduledSlice:
        prompt = array("i", prompts[slot])
        return ScheduledSlice(
            request_id=str(slot), slot=slot, token_ids=array("i") if step else prompt,
            cached_len=len(prompt) + step - 1 if step else 0, prompt_len=len(prompt),
            block_ids=range(32 * slot, 32 * slot + 32), sparse=False, sampling=GREEDY,
            extras=extras if step == 0 and slot == 1 else None)

    found = list[int]()
    for step in (0, *range(1, 6, repeats)):
        found += runner.execute(ScheduledBatch(
            step_id=step, repeats=repeats if step else 1,
            slices=tuple(item(slot, step) for slot in range(3)))).token_ids
        assert runner._last_tokens.min() >= 0 and runner._last_tokens.max() < 264
    return [tuple(found[slot::3]) for slot in range(3)]


@pytest.mark.parametrize(("extras", "repeats"), [
    (None, 1), (None, 5), (SamplingExtras(presence_penalty=1.0, logprobs=1), 1)], ids=str)
def test_decode_graphs_and_bursts_go_on_past_it(
    sick: Path, extras: SamplingExtras | None, repeats: int,
) -> None:
    """A step that is ahead of the host reads some token for the sick request: its keys are NaN."""
    wanted = decode(load_runner(sick), None, 1)
    assert wanted[1] == (-1,) * 6 and min(wanted[0] + wanted[2]) >= 0
    assert decode(load_runner(sick), extras, repeats) == wanted
    with_graphs = load_runner(sick)
    use_graphs(with_graphs)
    assert decode(with_graphs, extras, repeats) == wanted


# -- the scheduler's side --------------------------------------------------------------------------


class Failing(FakeRunner):
    """Has no token for request b from some length on, and goes on with it while it is asked to, as
    a runner does that is ahead of the host."""

    fails_at = 0

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute, then take tokens away."""
        result = super().execute(batch)
        rows = [item for item in batch.slices if item.sampling is not None]
        tokens = [-1 if rows[place % len(rows)].request_id == "b"
                  and rows[place % len(rows)].cached_len + place // len(rows) >= self.fails_at
                  else token for place, token in enumerate(result.token_ids)]
        return StepResult(step_id=result.step_id, epoch=result.epoch, token_ids=tuple(tokens),
                          repeats=result.repeats, elapsed_s=result.elapsed_s)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("burst_s", [0.0, 1.0])
@pytest.mark.parametrize("fails_at", [0, 8, 10, 13])
def test_a_failed_request_leaves_nothing_behind(
    depth: int, burst_s: float, fails_at: int,
) -> None:
    config = replace(CONFIG, burst_s=burst_s)
    runner = Failing(num_blocks=16, block_size=4, prefill_chunk_len=8, tail_len=3)
    runner.fails_at = fails_at
    scheduler = Scheduler(config)
    loop = Loop(scheduler, DeepTransport(runner, depth))
    requests = [make_request(name, prompt, max_tokens=12, ignore_eos=True)
                for name, prompt in (("a", [1, 2, 3]), ("b", range(8)), ("c", [4] * 9))]
    for request in requests:
        loop.add(request)
    updates = []
    while not loop.is_idle:
        updates += loop.turn().updates
    for request in (requests[0], requests[2]):
        assert list(request.output_ids) == complete(request.prompt_ids, request.params)
    failed = [update for update in updates if update.failure]
    assert [(update.request_id, update.failure, update.token_id) for update in failed] == [
        ("b", NOT_FINITE, None)]
    before = complete(range(8), requests[1].params)[: max(0, fails_at - 7)]
    assert list(requests[1].output_ids) == before
    scheduler.check()
    assert scheduler.pool.num_available == 16
