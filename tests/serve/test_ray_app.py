"""What Ray is asked for and told, without Ray; `tests/serve/try_ray.py` has a cluster."""

from __future__ import annotations

import asyncio
import builtins
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from longspan.engine.front.client import AsyncEngine
from longspan.errors import LongspanError, MissingDependencyError
from longspan.serve import ray_app
from longspan.serve.ray_app import SHARE, RayOptions, Replica, wanted_replicas
from tests.serve.fake import FakeEngine


def replica(**status: Any) -> tuple[Replica, FakeEngine]:
    engine = FakeEngine(**status)
    return Replica(RayOptions(model="nano", target_wait_s=5.0), cast(AsyncEngine, engine)), engine


@pytest.mark.parametrize(("engine", "resources"), [
    ({}, {"num_cpus": 1.0, "num_gpus": 1.0}),
    ({"tensor_parallel": 2, "context_parallel": 2}, {"num_cpus": 1.0, "num_gpus": 4.0}),
    ({"device": "cpu"}, {"num_cpus": 1.0}),
    ({"device": "cpu", "num_threads": 3, "pipeline_parallel": 2}, {"num_cpus": 6.0})])
def test_a_replica_asks_for_what_its_ranks_need(
    engine: dict[str, Any], resources: dict[str, float],
) -> None:
    assert RayOptions(model="nano", engine=engine).resources() == resources


def test_options_come_as_text_and_lists() -> None:
    """As ``serve run`` and YAML files bring them."""
    options = RayOptions.model_validate({
        "model": "nano", "max_replicas": "3", "server": {"api_keys": ["a", "b"]}})
    assert options.max_replicas == 3
    config = options.serve_config()
    assert config.api_keys == ("a", "b") and config.is_public


def test_dictionaries_come_from_a_command_line_too() -> None:
    """As in ``serve run ... engine='{"device": "cpu"}'``."""
    options = RayOptions.model_validate({"model": "nano", "engine": '{"device": "cpu"}'})
    assert options.resources() == {"num_cpus": 1.0}
    for wrong in ("{device: cpu}", "[1]"):
        with pytest.raises(ValidationError, match="engine"):
            RayOptions.model_validate({"model": "nano", "engine": wrong})


@pytest.mark.parametrize(("options", "words"), [
    ({"models": "x"}, "Extra inputs are not permitted"),
    ({"min_replicas": 3}, "max_replicas 1 is less than min_replicas 3"),
    ({"server": {"port": 9}}, "host and port are Ray's"),
    ({"server": {"speed": 9}}, "unexpected keyword argument 'speed'; see EngineConfig"),
    ({"engine": {"speed": 9}}, "unexpected keyword argument 'speed'; see EngineConfig"),
    ({"engine": {"tensor_parallel": 0}}, "tensor_parallel must be positive, not 0")])
def test_what_no_replica_could_start_with_is_refused(
    options: dict[str, Any], words: str,
) -> None:
    with pytest.raises(ValidationError, match=words):
        RayOptions.model_validate({"model": "nano", **options})


def test_a_replica_tells_how_much_it_has_to_do() -> None:
    """Places taken, or seconds of waiting prompts by how many there may be."""
    idle, _ = replica()
    assert idle.record_autoscaling_stats() == {SHARE: 0.0}
    busy, _ = replica(num_running=3, max_num_requests=4)
    assert busy.record_autoscaling_stats() == {SHARE: 0.75}
    gate = busy.application().state.service.gate
    gate.backlog_s = lambda: 20.0
    assert busy.record_autoscaling_stats() == {SHARE: 4.0}


@pytest.mark.parametrize(("shares", "wanted"), [
    ({"a": 0.0, "b": 0.0}, 1), ({"a": 0.4, "b": 0.6}, 1), ({"a": 0.4, "b": 0.7}, 2),
    ({"a": 6.0}, 6), ({}, 2), (None, 2)])
def test_replicas_follow_the_work(shares: dict[str, float] | None, wanted: int) -> None:
    """As long as none has told of any, they stay as many as they are."""
    metrics = None if shares is None else {SHARE: shares}
    context: Any = SimpleNamespace(current_num_replicas=2, aggregated_metrics=metrics)
    assert wanted_replicas(context) == (wanted, {})


def test_a_dead_engine_is_a_sick_replica() -> None:
    async def live() -> None:
        one, engine = replica()
        await one.load()
        one.check_health()
        engine.set(state="dead", reason="rank 1 was killed by SIGKILL")
        with pytest.raises(LongspanError, match="stopped: rank 1 was killed by SIGKILL"):
            one.check_health()
        await one.close()

    asyncio.run(live())


def test_without_ray_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'longspan\[ray\]'"):
        ray_app.app(RayOptions(model="nano"))


def test_the_application_takes_what_ray_hands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain dictionary: Ray reads annotations as they stand, and here they are text."""
    asked = dict[str, Any]()

    def deployment(target: object, **options: Any) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(bind=lambda options: options)

    serve = SimpleNamespace(deployment=deployment, ingress=lambda: lambda target: target)
    config = SimpleNamespace(AutoscalingConfig=SimpleNamespace, AutoscalingPolicy=SimpleNamespace)
    for name, module in (("ray", SimpleNamespace(serve=serve)), ("ray.serve.config", config)):
        monkeypatch.setitem(sys.modules, name, module)
    options = ray_app.app({"model": "nano", "engine": {"device": "cpu"}, "max_replicas": "2"})
    assert options.max_replicas == 2 and asked["ray_actor_options"] == {"num_cpus": 1.0}
    with pytest.raises(ValidationError, match="Extra inputs"):
        ray_app.app({"models": "nano"})
