"""Messages and frames."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.engine.control.scheduler import Load, SchedulerConfig
from longspan.engine.intake import Intake
from longspan.engine.processes.wire import (
    Abort,
    Add,
    BadFrameError,
    Begin,
    Codec,
    Described,
    Died,
    FromEngine,
    LoadChanged,
    Loaded,
    Message,
    Step,
    Stepped,
    Submitted,
    ToScheduler,
    computed_slices,
    encode,
    last_words,
)
from longspan.engine.request import SamplingParams
from longspan.engine.step import (
    Pieces,
    RowLogprobs,
    RowSampling,
    SamplingExtras,
    ScheduledBatch,
    ScheduledSlice,
    StepResult,
)
from longspan.errors import CheckpointError
from tests.doubles import make_request

CONFIG = SchedulerConfig(
    num_blocks=9, block_size=4, max_model_len=64, prefill_chunk_len=8, max_num_requests=2)
RESULT = StepResult(
    step_id=5, epoch=2, token_ids=(7, -1), elapsed_s=0.25, kept_pairs=3.5,
    logprobs=(RowLogprobs(-0.5, (1, 2), (-0.5, -float("inf"))), None),
    failures={1: "no way on"})
EXTRAS = SamplingExtras(
    presence_penalty=0.5, prompt_ids=array("i", [3, 4]), logit_bias=((5, -1.0),), constraint="{}")
SLICES = (
    ScheduledSlice(
        request_id="a/0", token_ids=array("i", range(8)), cached_len=8, prompt_len=40,
        block_ids=[4, 2], sparse=True, sampling=None, pieces=Pieces(2, 4, 8)),
    ScheduledSlice(
        request_id="é", slot=1, token_ids=array("i"), cached_len=50, prompt_len=40, block_ids=[],
        sparse=False, extras=EXTRAS, sampling=RowSampling(
            temperature=0.5, top_k=1, top_p=0.5, min_p=0.0, seed=2**63 - 1)))
BATCH = ScheduledBatch(step_id=5, epoch=2, slices=SLICES)
PARAMS = SamplingParams(
    stop=("x",), stop_token_ids=(1,), logit_bias=((3, 1.5),), logprobs=2, seed=2**63 - 1)


def request_with(params: SamplingParams) -> Add:
    request = make_request("b", range(300), sparse=True)
    request.params = params
    return Add(request)


@pytest.mark.parametrize(("kind", "message"), [
    (ToScheduler, Begin(CONFIG)), (ToScheduler, request_with(PARAMS)), (ToScheduler, Abort("a/0")),
    (ToScheduler, RESULT),
    (Step, Step(BATCH, {"é": b"\x01\0\0\0"})),
    (FromEngine, Described(path=Path("/a/b"), intake=Intake(vocab_size=9, max_model_len=64),
                         scheduler=CONFIG, memory_bytes={"weights": 2**40})),
    (FromEngine, Loaded()), (FromEngine, Submitted((("a", 3),))),
    (FromEngine, LoadChanged(Load(num_waiting=3))), (FromEngine, Died("why", is_mendable=True)),
    (FromEngine, Stepped(slices=computed_slices(BATCH), result=RESULT, started_s=1.5,
                         finished_s=2.5))],
    ids=lambda value: type(value).__name__ if isinstance(value, Message) else "")
def test_there_and_back(kind: object, message: Message | StepResult) -> None:
    assert Codec(kind).decode(encode(message)) == message


def test_computed_slices_tell_how_far_a_slice_got() -> None:
    paused, decode = computed_slices(BATCH)
    assert (paused.cached_len, paused.computed_len, paused.samples) == (8, 12, False)
    assert (decode.cached_len, decode.computed_len, decode.samples) == (50, 51, True)


@pytest.mark.parametrize("frame", [
    b"", b"\x00", b"\xc1", b"\x91" * 99_999, b"\x91\xa4Died", encode(Loaded()),
    b"\x92\xa5Abort\x05", encode(Abort("a")) + b"\x00", encode(Abort("a"))[:-1],
    encode(request_with(PARAMS)).replace(b"\xa5top_p\xcb?\xf0", b"\xa5top_p\xcb\xbf\xf0")],
    ids=range(10))
def test_bad_frames(frame: bytes) -> None:
    with pytest.raises(BadFrameError, match=f"{len(frame)} bytes: "):
        Codec(ToScheduler).decode(frame)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_no_bytes_do_any_harm(noise: bytes, place: int) -> None:
    good = encode(request_with(PARAMS))
    frame = good[:place] + noise + good[place + len(noise):]
    for kind in (ToScheduler, Step, FromEngine):
        try:
            Codec(kind).decode(frame)
        except BadFrameError:
            continue


def test_last_words(caplog: pytest.LogCaptureFixture) -> None:
    assert last_words(CheckpointError("no\n weights")) == Died("no weights", is_mendable=True)
    assert not caplog.records
    assert last_words(RuntimeError("lost\nmore")) == Died("RuntimeError: lost")
    assert last_words(KeyError()) == Died("KeyError: no message")
    assert len(caplog.records) == 2
