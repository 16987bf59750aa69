"""Ray Serve on this machine serves nano: run by `make test-ray`, which installs Ray.

Its name keeps it from `make test`, whose environment has no Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
import ray
from ray import serve

from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.serve.ray_app import app

PORT, TIMEOUT_S = 8701, 180.0
URL = f"http://127.0.0.1:{PORT}"
ENGINE = {"device": "cpu", "num_threads": 1, "max_model_len": 8192, "step_budget_s": 0.2}
ASKED = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of one machine, with two ranks in a replica, and another one allowed."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(app({  # as `serve run` passes them
        "model": "nano", "engine": json.dumps({**ENGINE, "context_parallel": 2}),
        "max_replicas": "2", "server": json.dumps({"api_keys": ["key"]})}),
        name="longspan", route_prefix="/")
    yield
    serve.shutdown()
    ray.shutdown()


def ask(**changes: object) -> httpx.Response:
    return httpx.post(f"{URL}/v1/completions", json={**ASKED, **changes}, timeout=TIMEOUT_S,
                      headers={"Authorization": "Bearer key"})


def ranks() -> list[psutil.Process]:
    """The second rank of each replica."""
    return [process for process in psutil.process_iter(["cmdline"])
            if "longspan-rank-1" in (process.info["cmdline"] or [])]


def until(condition: object, what: str) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end_s, f"waited for {what}"
        time.sleep(0.5)


def test_a_replica_answers_as_one_process(cluster: None) -> None:
    with LLM("nano", **{**ENGINE, "step_budget_s": None}) as llm:
        (wanted,) = llm.generate(str(ASKED["prompt"]), SamplingParams(max_tokens=8))
    reply = ask()
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["text"] == wanted.text
    assert len(ranks()) == 1


def test_streams_refusals_and_health_come_through(cluster: None) -> None:
    with httpx.stream("POST", f"{URL}/v1/completions", json={**ASKED, "stream": True},
                      headers={"Authorization": "Bearer key"}, timeout=TIMEOUT_S) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data: {")]
    text = "".join(choice["text"] for line in lines for choice in json.loads(line[6:])["choices"])
    assert text == ask().json()["choices"][0]["text"] and len(lines) > 2
    assert httpx.post(f"{URL}/v1/completions", json=ASKED).status_code == 401
    assert ask(max_tokens=100_000).status_code == 400
    assert httpx.get(f"{URL}/health").json()["status"] == "ready"


def test_a_replica_whose_rank_is_killed_is_replaced(cluster: None) -> None:
    (before,) = ranks()
    before.kill()
    until(lambda: [process.pid for process in ranks()] not in ([], [before.pid]), "another replica")
    until(lambda: ask().status_code == 200, "its answer")


def test_waiting_prompts_bring_a_second_replica(cluster: None) -> None:
    """More than ten seconds of them; afterwards nothing of Ray's is left to do."""
    import threading

    prompt = "word " * 1500
    threads = [threading.Thread(target=ask, kwargs={
        "prompt": f"{number} {prompt}", "max_tokens": 400}) for number in range(64)]
    for thread in threads:
        thread.start()
    until(lambda: len(ranks()) == 2, "a second replica")
    for thread in threads:
        thread.join()
