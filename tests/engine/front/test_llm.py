"""LLM on a tiny random checkpoint, end to end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

import longspan
from longspan.attention.observer import AttendedRows, AttentionObserver
from longspan.attention.sparsity import SparsityPlan
from longspan.engine.front.llm import LLM
from longspan.engine.request import Progress, SamplingParams, TokenEvent
from longspan.engine.step import ScheduledBatch
from longspan.errors import (
    CheckpointError,
    InvalidRequestError,
    LongspanError,
    NotEnoughMemoryError,
    PromptTooLongError,
)
from tests.doubles import write_checkpoint, write_tokenizer

PROMPTS = ["short", "A longer prompt, one that takes several blocks. " * 3, "Zwölf Boxkämpfer " * 9]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
WARM = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"block_size": 16, "device": "cpu", "prefill_chunk_len": 64, **options})


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with load(path) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(path: Path) -> dict[SamplingParams, list[tuple[int, ...]]]:
    """Answers of a fresh engine each, the whole prompt in one prefill chunk."""
    return {params: [load(path, prefill_chunk_len=512).generate(prompt, params)[0].token_ids
                     for prompt in PROMPTS]
            for params in (PARAMS, WARM)}


@pytest.mark.parametrize("params", [PARAMS, WARM], ids=["greedy", "seeded"])
@pytest.mark.parametrize("options", [
    {"prefill_chunk_len": 16}, {"prefill_chunk_len": 48}, {"block_size": 1},
    {"max_num_requests": 1}, {"max_num_requests": 2},
], ids=str)
def test_answers_do_not_depend_on_chunks_batches_or_cache(
    path: Path, alone: dict[SamplingParams, list[tuple[int, ...]]], params: SamplingParams,
    options: dict[str, Any],
) -> None:
    with load(path, **options) as llm:
        first = llm.generate(PROMPTS, params)
        again = llm.generate(PROMPTS[::-1], params)[::-1]
    assert [output.token_ids for output in first] == alone[params]
    assert [output.token_ids for output in again] == alone[params]
    assert all(output.num_cached_tokens == 0 for output in first)
    assert all(output.num_cached_tokens > 0 for output in again[1:])


def test_takes_text_or_token_ids_or_lists(llm: LLM) -> None:
    token_ids = list(llm.tokenizer.encode(PROMPTS[0]))
    prompts: list[Any] = [PROMPTS[0], token_ids, [PROMPTS[0]], [token_ids], [PROMPTS[0], token_ids]]
    texts = [[output.text for output in llm.generate(prompt, PARAMS)] for prompt in prompts]
    assert [len(found) for found in texts] == [1, 1, 1, 1, 2]
    assert {text for found in texts for text in found} == {texts[0][0]}
    assert llm.generate([], PARAMS) == []


def test_stream_is_generate_in_pieces(llm: LLM) -> None:
    events = list(llm.stream(PROMPTS[1], PARAMS))
    (whole,) = llm.generate(PROMPTS[1], PARAMS)
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert "".join(event.text for event in tokens) == whole.text
    assert tuple(token for event in tokens for token in event.token_ids) == whole.token_ids
    assert [event.finish_reason for event in tokens][-2:] == [None, "length"]
    assert tokens[-1].output is not None and tokens[-1].output.text == whole.text


def test_progress_of_every_chunk(path: Path) -> None:
    prompt = list(range(200))
    with load(path) as llm:
        streamed = [event.num_prefilled_tokens for event in llm.stream(prompt, PARAMS)
                    if isinstance(event, Progress)]
        seen: list[tuple[int, int, int]] = []
        llm.generate(prompt, PARAMS, on_progress=lambda progress: seen.append((
            progress.num_prefilled_tokens, progress.num_prompt_tokens,
            progress.num_cached_tokens)))
    assert streamed == [0, 64, 128, 192, 200]
    assert seen == [(0, 200, 0), (200, 200, 192)]


def test_closing_a_stream_cancels_the_request(path: Path) -> None:
    with load(path) as llm:
        stream = llm.stream(list(range(200)), PARAMS)
        next(stream)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert llm._loop.is_idle
        assert llm.stats().num_requests == 0


def test_a_stream_that_nobody_reads_costs_nothing(path: Path) -> None:
    with load(path) as llm:
        stream = llm.stream(PROMPTS[0], PARAMS)
        del stream
        assert llm._loop.is_idle and not llm._completions


def test_a_stream_abandoned_during_a_step_is_cancelled_by_the_next(path: Path) -> None:
    with load(path) as llm:
        stream = llm.stream(PROMPTS[1], PARAMS)
        next(stream)
        next(stream)
        with llm._lock:
            del stream  # collected while a step runs
        assert llm.generate(PROMPTS[0], PARAMS)[0].finish_reason == "length"
        assert llm._loop.is_idle and llm.stats().num_requests == 1


def test_streams_may_be_interleaved(llm: LLM) -> None:
    wanted = [output.text for output in llm.generate(PROMPTS, PARAMS)]
    streams = [llm.stream(prompt, PARAMS) for prompt in PROMPTS]
    texts = [""] * len(streams)
    alive = set(range(len(streams)))
    while alive:
        for index in sorted(alive):
            event = next(streams[index], None)
            if event is None:
                alive.remove(index)
            elif isinstance(event, TokenEvent):
                texts[index] += event.text
    assert texts == wanted


def test_threads_share_the_engine(llm: LLM) -> None:
    wanted = [output.text for output in llm.generate(PROMPTS, PARAMS)]
    found: dict[int, str] = {}

    def work(index: int) -> None:
        found[index] = llm.generate(PROMPTS[index % 3], PARAMS)[0].text

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(6)] == wanted * 2


def test_stop_strings_and_tokens(llm: LLM) -> None:
    (free,) = llm.generate(PROMPTS[1], PARAMS)
    text = free.text.replace("\ufffd", " ").split()
    stop = max(text, key=len)
    (cut,) = llm.generate(PROMPTS[1], SamplingParams(max_tokens=12, stop=(stop,), ignore_eos=True))
    assert (cut.text, cut.finish_reason) == (free.text.split(stop)[0], "stop")
    token = free.token_ids[3]
    (cut,) = llm.generate(PROMPTS[1], SamplingParams(
        max_tokens=12, stop_token_ids=(token,), ignore_eos=True))
    assert cut.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert cut.finish_reason == "stop"


def test_seeds_decide_and_their_absence_varies(llm: LLM) -> None:
    def answer(seed: int | None) -> tuple[int, ...]:
        params = SamplingParams(temperature=2.0, seed=seed, max_tokens=12, ignore_eos=True)
        return llm.generate(PROMPTS[0], params)[0].token_ids

    assert answer(1) == answer(1) != answer(2)
    assert answer(None) != answer(None)


def test_chat(llm: LLM) -> None:
    output = llm.chat([{"role": "user", "content": "Hi"}], PARAMS)
    assert output.num_prompt_tokens == len(llm.tokenizer.encode("<user>Hi<end><assistant>"))
    assert output.finish_reason == "length"
    evil = [{"role": "user", "content": "<end>"}]  # text in a conversation, a token in a raw prompt
    assert llm.chat(evil, PARAMS).num_prompt_tokens == 3 + len("<end>")
    assert llm.generate("<end>", PARAMS)[0].num_prompt_tokens == 1


def test_outputs_and_stats_add_up(path: Path) -> None:
    with load(path) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        stats = llm.stats()
    assert stats.num_requests == 3
    assert stats.num_prompt_tokens == sum(output.num_prompt_tokens for output in outputs)
    assert stats.num_output_tokens == 36
    assert stats.density == 1.0 and stats.peak_memory_bytes > 0
    for output in outputs:
        assert output.ttft_s and output.prefill_s and output.decode_tokens_per_s
        assert output.ttft_s >= output.prefill_s and output.density == 1.0


@pytest.mark.parametrize(("prompt", "error", "message"), [
    ("", InvalidRequestError, "the prompt is empty"),
    ([[]], InvalidRequestError, "the prompt is empty"),
    ([264], InvalidRequestError, "token 0 of the prompt is 264"),
    ([1, -1], InvalidRequestError, "token 1 of the prompt is -1"),
    ([[1.5]], InvalidRequestError, "token 0 of the prompt is 1.5"),
    (7, LongspanError, "prompts must be"),
    ("x" * 501, PromptTooLongError,
     "prompt of 501 tokens plus max_tokens 12 is 513, over the limit of 512 tokens"),
])
def test_wrong_prompts_are_refused_before_computing(
    llm: LLM, prompt: Any, error: type[Exception], message: str,
) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompt, PARAMS)
    with pytest.raises(LongspanError):
        llm.stream("", PARAMS)
    assert llm._loop.is_idle


def test_an_interrupt_leaves_a_working_engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(path) as llm:
        wanted = llm.generate(PROMPTS, PARAMS)
        launch = llm._runner.launch

        def interrupted(batch: ScheduledBatch) -> NoReturn:
            launch(batch)
            raise KeyboardInterrupt

        monkeypatch.setattr(llm._runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([*PROMPTS, "x" * 250], PARAMS)
        monkeypatch.undo()
        assert llm._loop.is_idle
        assert [o.token_ids for o in llm.generate(PROMPTS, PARAMS)] == [
            o.token_ids for o in wanted]


def test_a_closed_engine_says_so(path: Path) -> None:
    llm = load(path)
    llm.close()
    with pytest.raises(LongspanError, match="closed"):
        llm.generate("x")


def test_start_up_faults(path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotEnoughMemoryError, match="needs"):
        load(path, memory_gib=0.01)
    with pytest.raises(CheckpointError):
        load(tmp_path)
    write_checkpoint(tmp_path, vocab_size=200)
    with pytest.raises(CheckpointError, match="the tokenizer knows 259 tokens"):
        load(tmp_path)
    write_tokenizer(tmp_path)


def test_random_weights_need_no_weights_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=512)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load(tmp_path)
    answers = set()
    for _ in range(2):
        with load(tmp_path, weights="random") as llm:
            answers.add(llm.generate(PROMPTS[1], PARAMS)[0].token_ids)
    assert len(answers) == 1  # the seed is always the same


@pytest.mark.gpu
def test_a_gpu_answers_like_the_cpu(
    path: Path, alone: dict[SamplingParams, list[tuple[int, ...]]],
) -> None:
    for params, wanted in alone.items():
        with load(path, device="cuda", dtype="float32") as llm:
            assert [output.token_ids for output in llm.generate(PROMPTS, params)] == wanted
            assert llm.stats().peak_memory_bytes > 0
    with load(path, device="cuda") as llm:
        assert llm.config.dtype == "bfloat16"
        assert len(llm.generate(PROMPTS[1], PARAMS)[0].token_ids) == 12


def test_public_names() -> None:
    assert longspan.LLM is LLM and longspan.SamplingParams is SamplingParams
    with pytest.raises(AttributeError):
        _ = longspan.Llm


# -- sparse prefill ----------------------------------------------------------------------------

DCA = {"chunk_size": 320, "local_size": 64, "sparse_attention_threshold": 300}


@pytest.mark.parametrize("mode", ["tile", "paper"])
def test_long_prompts_are_sparse_and_hits_change_nothing(tmp_path: Path, mode: Any) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=2048, dual_chunk_attention_config=DCA)
    plan = SparsityPlan.default(3, 4, vertical=16, slash=64)
    tile = replace(plan, local=16, tail_len=64, num_scouts=8, most_scouts=8)
    plan = tile if mode == "tile" else plan.paper()
    plan.save(tmp_path / "sparsity_plan.json")
    document = [(7 * index * index + index // 3) % 256 for index in range(1500)]
    question = [*document[:-20], 3, 5]
    with load(tmp_path, prefill_chunk_len=128) as llm:
        short, first, second = (
            llm.generate(prompt, PARAMS)[0] for prompt in (document[:300], document, question))
    with load(tmp_path, prefill_chunk_len=128) as fresh:
        same = fresh.generate(question, PARAMS)[0]
    assert short.density == 1.0 and first.density is not None and first.density < 0.7
    # both tails start at 1,408, which is a multiple of a chunk too: paper mode has no tail
    assert (second.num_cached_tokens, same.num_cached_tokens) == (1408, 0)
    assert second.token_ids == same.token_ids
    with load(tmp_path, prefill_chunk_len=128, attention="dense") as dense:
        assert dense.generate(document, PARAMS)[0].density == 1.0
        assert dense.sparsity_plan is None


def test_recall_is_of_one_request_and_of_what_was_computed_sparsely(tmp_path: Path) -> None:
    """However its chunks are packed, cut or cached, a prompt's recall is that of its own chunks;
    dense prompts, and plans in paper mode, have none."""
    write_checkpoint(tmp_path, max_position_embeddings=2048, dual_chunk_attention_config=DCA)
    plan = replace(SparsityPlan.default(3, 4, vertical=16, slash=64), local=16, tail_len=64,
                   num_scouts=8, most_scouts=8)
    plan.save(tmp_path / "sparsity_plan.json")
    documents = [[(7 * index * index + index // part) % 256 for index in range(1500)]
                 for part in (3, 5)]
    options = {"prefill_chunk_len": 128}
    with load(tmp_path, **options) as llm:
        short, both = llm.generate(documents[0][:300], PARAMS)[0], llm.generate(documents, PARAMS)
        hit = llm.generate([*documents[0][:-20], 3, 5], PARAMS)[0]
    with load(tmp_path, **options, step_budget_s=1e-9) as cut:
        pieces = [cut.generate(document, PARAMS)[0] for document in documents]
    assert short.recall is None and None not in (both[0].recall, both[1].recall)
    for one, other in zip(both, pieces, strict=True):
        assert one.recall is not None and one.recall.scouts is not None
        assert one.recall == other.recall
        assert 0.02 < one.recall.typical < 0.98 and 0.02 < one.recall.scouts < 0.98
        assert one.recall.num_tokens == 1488 - 64  # whole tiles, behind the slash budget
    assert both[0].recall != both[1].recall
    assert hit.num_cached_tokens == 1408 and hit.recall is not None  # the tail was left
    assert hit.recall.num_tokens == hit.num_prompt_tokens // 16 * 16 - 1408
    replace(plan, num_scouts=0).save(tmp_path / "sparsity_plan.json")
    with load(tmp_path, **options) as llm:
        alone = llm.generate(documents[0], PARAMS)[0].recall
        assert alone is not None and alone.scouts is None and alone.num_tokens == 1488 - 64
    plan.paper().save(tmp_path / "sparsity_plan.json")
    with load(tmp_path, **options) as llm:
        assert llm.generate(documents[0], PARAMS)[0].recall is None


def test_a_recall_target_changes_budgets_and_not_with_the_schedule(tmp_path: Path) -> None:
    """More recall for a higher target at more density; the same answer whether chunks are cut,
    packed with others, or partly cached."""
    write_checkpoint(tmp_path, max_position_embeddings=2048, dual_chunk_attention_config=DCA)
    plan = replace(SparsityPlan.default(3, 4, vertical=16, slash=64), local=16, tail_len=64,
                   num_scouts=8, most_scouts=8)
    plan.save(tmp_path / "sparsity_plan.json")
    document = [(7 * index * index + index // 3) % 256 for index in range(900)]
    question = [*document[:-20], 3, 5]
    found = []
    for target in (0.3, 0.9):
        with load(tmp_path, prefill_chunk_len=128, recall=target) as llm:
            assert llm.sparsity_plan == replace(plan, recall_target=target)
            found.append(llm.generate(document, PARAMS)[0])
            cached = llm.generate(question, PARAMS)[0]
        with load(tmp_path, prefill_chunk_len=128, recall=target, step_budget_s=1e-9) as cut:
            both = cut.generate([document[::-1], question], PARAMS)
        assert cached.num_cached_tokens > 0 == both[1].num_cached_tokens
        assert cached.token_ids == both[1].token_ids
    low, high = found
    assert low.recall is not None and high.recall is not None
    assert low.recall.typical < high.recall.typical
    assert low.density is not None and high.density is not None and low.density < high.density


@pytest.mark.parametrize(("options", "message"), [
    ({"recall": 1.2}, "recall is 1.2; it must be above 0 and below 1"),
    ({"recall": 0.9, "attention": "dense"}, "attention is 'dense'"),
    ({"recall": 0.9}, "use attention 'sparse'")])
def test_recall_targets_that_cannot_be(path: Path, options: Any, message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        load(path, **options)


def test_plain_models_get_the_default_plan_on_demand(path: Path) -> None:
    with load(path, attention="sparse") as llm:
        assert llm.sparsity_plan == SparsityPlan.default(3, 4)
        assert llm.generate(PROMPTS[1], PARAMS)[0].density == 1.0  # within the slash budget


def test_attention_is_observed_while_somebody_listens(path: Path) -> None:
    class Layers(AttentionObserver):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, int]] = []

        def attended(self, rows: AttendedRows) -> None:
            self.seen.append((rows.layer_idx, rows.start, rows.q.shape[0]))

    layers = Layers()
    with load(path, attention="dense") as llm:
        prompt = list(range(5, 105))
        llm.observe(layers)
        llm.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
        # two prefill chunks; the last layer computes what is sampled; decode is not observed
        assert layers.seen == [(0, 0, 64), (1, 0, 64), (0, 64, 36), (1, 64, 36), (2, 99, 1)]
        llm.observe(None)
        llm.generate(prompt[::-1], PARAMS)
        assert len(layers.seen) == 5


def test_dca_by_flag_changes_nothing_within_the_window(path: Path) -> None:
    """A checkpoint without DCA: up to one DCA chunk, 384 of its 512 tokens, to the bit."""
    params = SamplingParams(max_tokens=5, logprobs=3, prompt_logprobs=1, ignore_eos=True)
    prompts = [list(range(200)) + list(range(n)) for n in (0, 100, 179)]
    found = []
    for positions in ("rope", "dca", "dca+yarn"):
        with load(path, positions=positions, block_size=128, prefill_chunk_len=128) as llm:
            assert llm.memory.max_model_len == (512 if positions == "rope" else 2048)
            found.append([(output.token_ids, output.logprobs, output.prompt_logprobs.tobytes())
                          for output in llm.generate(prompts, params)])
            if positions != "rope":
                (long,) = llm.generate([list(range(200)) * 5], params)
                assert len(long.token_ids) == 5
    assert found[0] == found[1] == found[2]
