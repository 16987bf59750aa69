"""bench serve on a tiny model: a real server, real sockets, small sizes."""

from __future__ import annotations

import json
import resource
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from longspan.bench.server import crowd, serve, soak
from longspan.bench.server.run_ahead import PROMPT_LEN, rate_and_idle
from longspan.bench.server.serve import ServeJob, longest_pause_s, run
from longspan.bench.server.server import Server, Usage, lag_quantile_s, quantile, running
from longspan.config import EngineConfig
from longspan.engine.processes.wire import ComputedSlice, Stepped
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.step import StepResult
from longspan.errors import LongspanError
from tests.doubles import write_checkpoint
from tests.serve.fake import FakeEngine
from tests.serve.fake import running as serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("served"), num_hidden_layers=2, max_position_embeddings=16_384)


def job_of(model: Path, out: Path, **changes: Any) -> ServeJob:
    return ServeJob(**{
        "model": str(model), "scenarios": ("prefill",), "length": 2000, "budget_s": 0.2,
        "batches": (1, 3), "soak_s": 0.0, "device": "cpu", "threads": 1, "out": out, **changes})


def rows_of(out: Path) -> dict[str, dict[str, float]]:
    (file,) = out.glob("serve.*.json")
    found: dict[str, dict[str, float]] = {}
    for row in json.loads(file.read_text())["rows"]:
        found.setdefault(row["scenario"], {})[row["metric"]] = row["value"]
    return found


def test_prefill_and_follow_up(model: Path, tmp_path: Path) -> None:
    assert run(job_of(
        model, tmp_path, length=15_000, budget_s=0.05, scenarios=("prefill", "followup")))
    found = rows_of(tmp_path)
    prefill, follow = found["prefill"], found["followup"]
    assert prefill["short_requests"] >= 1 and prefill["long_ttft"] > 0
    assert prefill["short_ttft_median"] <= prefill["short_ttft_max"]
    assert prefill["short_ttft_max_budgets"] == pytest.approx(
        prefill["short_ttft_max"] / 0.05, rel=1e-3)
    assert prefill["decode_pause_max"] > 0 and prefill["health_p99"] > 0
    assert follow["followup_1_cached_tokens"] == follow["followup_2_cached_tokens"] == 14_976
    assert follow["followup_2_share"] < 100


def test_a_prompt_that_is_read_at_once_measures_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match="256 tokens were read before .* use a longer --length"):
        run(job_of(model, tmp_path, length=256, budget_s=5.0))


def test_decode_with_and_without_run_ahead(model: Path, tmp_path: Path) -> None:
    assert run(job_of(model, tmp_path, scenarios=("decode",)))
    found = rows_of(tmp_path)["decode"]
    for batch in (1, 3):
        ratio = found[f"tag_tokens_per_s_batch_{batch}"] / found[
            f"synchronous_tokens_per_s_batch_{batch}"]
        assert found[f"tag_over_synchronous_batch_{batch}"] == pytest.approx(ratio, rel=1e-3)
        assert 0 <= found[f"tag_idle_share_batch_{batch}"] <= 100


def test_crowd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "NUM_IDLE", 100)
    monkeypatch.setattr(serve, "HOSTILE", ('{"multipleOf": 9999991, "type": "integer"}', "{}", "["))
    assert run(job_of(Path("nano"), tmp_path, scenarios=("crowd",)))
    found = rows_of(tmp_path)["crowd"]
    assert found["idle_connections"] >= 100 and found["hostile_schemas"] == 3
    assert found["hostile_schemas_refused"] == 2 and found["hostile_schemas_other_errors"] == 0
    assert found["decode_pause_max"] == pytest.approx(
        0.2 * found["decode_pause_max_budgets"], rel=1e-2)
    assert found["decode_pause_max"] >= 0 < found["decode_pause_max_alone"]


def test_a_crowd_that_the_system_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    with pytest.raises(LongspanError, match="5,000 descriptors are needed and 4,096 allowed"):
        crowd.allow_files(5000)


def test_soak(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SAMPLE_PERIOD_S", 0.1)
    run(job_of(model, tmp_path, soak_s=3.0, length=1000))
    found = rows_of(tmp_path)["soak"]
    assert found["finished"] > 3 and found["failed"] == 0
    assert found["fds_last_third"] > 0 and found["threads_last_third"] > 0
    assert {"loaded_from_host", "loaded_from_disk"} <= found.keys()


def test_a_soaks_device_holds_little(model: Path, tmp_path: Path) -> None:
    options = serve.soak_options(job_of(model, tmp_path), 1_000, "kv")
    gib = float(options[options.index("--memory-gib") + 1])
    engine = ResolvedEngine.resolve(EngineConfig(
        model=str(model), device="cpu", memory_gib=gib, max_model_len=1_000 + serve.ROOM,
        prefill_chunk_len=serve.SOAK_CHUNK_LEN, max_num_requests=serve.SOAK_REQUESTS))
    num_tokens = engine.memory.num_blocks * engine.config.block_size
    assert 1_000 + serve.ROOM <= num_tokens < 1.5 * (1_000 + serve.ROOM)


@pytest.mark.parametrize(("device", "lengths"), [("cpu", [1000]), ("cuda", [])])
def test_a_pool_that_takes_its_memory_at_once_is_not_written_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, lengths: list[int],
) -> None:
    """A GPU's pool may hold so much that writing it takes longer than the soak."""
    written: list[int] = []
    monkeypatch.setattr(serve, "running", lambda model, options: nullcontext())
    monkeypatch.setattr(serve, "soak_options", lambda job, length, folder: [])
    monkeypatch.setattr(serve, "write_pool", lambda server, length: written.append(length))
    monkeypatch.setattr(serve, "soak", lambda server, seconds, length: [("leaks", 0.0, "")])
    assert len(serve._soak(job_of(tmp_path, tmp_path, device=device, length=1000))) == 1
    assert written == lengths


def test_what_is_measured_does_not_depend_on_the_checkpoints_advice() -> None:
    engine = FakeEngine(default_sampling={"temperature": 0.7, "repetition_penalty": 1.05})
    with serving(engine) as server:
        answer = Server(cast(Any, None), server.port).complete("x" * 20, 3)
    assert len(answer.token_s) == 3 and not answer.error
    (request,) = engine.requests
    assert (request.params.temperature, request.params.repetition_penalty) == (0, 1)


def test_growth_is_a_leak() -> None:
    flat = [Usage(rss_bytes=2**30, num_fds=90, num_threads=20)] * 9
    growing = [*flat[:6], *[Usage(rss_bytes=2**30, num_fds=120, num_threads=20)] * 3]
    assert not any(soak.is_leak(name, *pair) for name, pair in soak.growth(flat).items())
    leaks = [name for name, pair in soak.growth(growing).items() if soak.is_leak(name, *pair)]
    assert leaks == ["fds"]
    assert soak.is_leak("rss", 1000, 1060) and not soak.is_leak("rss", 1000, 1040)


def test_a_prompt_that_no_machine_can_hold(model: Path, tmp_path: Path) -> None:
    """The server refuses before the prompt is made."""
    with pytest.raises(LongspanError, match="did not start.*needs .* lower max_model_len to"):
        run(job_of(model, tmp_path, length=10**12, scenarios=("followup",)))


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match="did not start.*no config.json"), \
            running(str(tmp_path), ["--device", "cpu"]):
        pass


def test_refused_requests_say_so(model: Path) -> None:
    with running(str(model), ["--max-model-len", "500", "--threads", "1"]) as server:
        answer = server.complete([20] * 600, 5)
        assert "600" in answer.error
        with pytest.raises(LongspanError, match="no token"):
            assert answer.ttft_s
        server.wait_idle()
        assert isinstance(server, Server) and server.usage().num_threads > 2


def test_unknown_scenarios_are_refused(model: Path, tmp_path: Path) -> None:
    match = "'nothing' is not one of prefill, followup, decode, crowd"
    with pytest.raises(LongspanError, match=match):
        run(job_of(model, tmp_path, scenarios=("nothing",)))


def test_the_longest_pause_counts_what_reaches_into_the_span() -> None:
    tokens = [0.0, 1.0, 4.0, 4.5, 9.0]
    assert longest_pause_s(tokens, 2.0, 4.2) == 3.0
    assert longest_pause_s(tokens, 4.1, 8.0) == 4.5
    with pytest.raises(LongspanError, match="ended before"):
        longest_pause_s(tokens, 2.0, 10.0)


def test_quantiles() -> None:
    assert [quantile([3, 1, 2, 4], share) for share in (0.0, 0.25, 0.5, 0.99, 1.0)] == [
        1, 1, 2, 4, 4]
    name = "longspan_event_loop_lag_seconds_bucket"
    before = {f'{name}{{le="0.01"}}': 5.0, f'{name}{{le="0.1"}}': 5.0, f'{name}{{le="+Inf"}}': 5.0}
    after = {f'{name}{{le="0.01"}}': 95.0, f'{name}{{le="0.1"}}': 104.0,
             f'{name}{{le="+Inf"}}': 105.0}
    assert lag_quantile_s(before, after, 0.9) == 0.01
    assert lag_quantile_s(before, after, 0.99) == 0.1
    assert lag_quantile_s(before, after, 1.0) == float("inf")


def test_rate_and_idle_share() -> None:
    def step(finished_s: float, num_rows: int, computed_len: int = PROMPT_LEN + 1) -> Stepped:
        return Stepped(
            slices=tuple(ComputedSlice(str(i), computed_len - 1, computed_len, True)
                         for i in range(num_rows)),
            result=StepResult(step_id=0, token_ids=(1,) * num_rows, elapsed_s=0.09),
            started_s=0.0, finished_s=finished_s)

    steps = [step(0.5, 2, PROMPT_LEN), step(0.8, 1), *[step(1 + 0.1 * i, 2) for i in range(11)]]
    rate, idle = rate_and_idle(steps, 2)
    assert rate == pytest.approx(20.0) and idle == pytest.approx(0.1)
    with pytest.raises(LongspanError, match="too few steps"):
        rate_and_idle(steps, 5)


def test_random_weights_have_rows_of_their_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"metric": "long_ttft", "value": 1.0, "unit": "s", "length": 2000}
    monkeypatch.setitem(serve.SCENARIOS, "prefill", lambda job: [row])
    for weights in ("checkpoint", "random"):
        job = job_of(model, tmp_path, weights=weights)
        assert serve.server_options(job)[-4:] == ["--weights", weights, "--threads", "1"]
        assert run(job)
    (file,) = tmp_path.glob("serve.*.json")
    assert {found["model"] for found in json.loads(file.read_text())["rows"]} == {
        str(model), f"{model} (random weights)"}
