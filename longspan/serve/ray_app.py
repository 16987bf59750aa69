"""Ray Serve (extra ``ray``): replicas of a whole server, placed and scaled by Ray.

A replica is one engine with all of its ranks behind this server's own application, in one Ray actor
that asks for as many GPUs as there are ranks: Ray gives it a machine that has them free. Requests
come through Ray's proxies; limits, queue, errors and streams are those of `longspan serve`::

    serve run longspan.serve.ray_app:app model=nano engine='{"device": "cpu"}'   # or a YAML file

See docs/ranks.md.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Annotated, Any, Protocol

from fastapi import FastAPI
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    TypeAdapter,
    model_validator,
)

from longspan.config import EngineConfig
from longspan.engine.front.client import AsyncEngine
from longspan.errors import LongspanError, MissingDependencyError
from longspan.serve.app import create_app
from longspan.serve.config import ServeConfig
from longspan.serve.service import Service

POLL_S = 0.1
LOAD_S = 3_600.0
"""Longest that a replica may load."""
SHARE, PUBLIC = "longspan_share", "0.0.0.0"
"""Name of what replicas report; requests bear the names of Ray's proxies."""


JSON_OBJECT = TypeAdapter[dict[str, Any]](Json[dict[str, Any]])


def _read(value: object) -> object:
    """Read a dictionary that stood on a command line, where all values are text."""
    return JSON_OBJECT.validate_python(value) if isinstance(value, str) else value


Fields = Annotated[dict[str, Any], BeforeValidator(_read)]


class RayOptions(BaseModel):
    """Arguments of `app`, as ``serve run`` and Ray's YAML files pass them."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Directory, hub id, or ``nano``: the same on every machine."""
    engine: Fields = Field(default_factory=dict)
    """Other fields of `EngineConfig`: ``tensor_parallel``, ``max_model_len``, ... ``device: cpu``
    for replicas without GPUs."""
    server: Fields = Field(default_factory=dict)
    """Fields of `ServeConfig`: ``api_keys``, ``allowed_hosts``, ..."""
    min_replicas: int = Field(default=1, ge=1)
    """Replicas that are always there."""
    max_replicas: int = Field(default=1, ge=1)
    """The most that there may be."""
    target_wait_s: float = Field(default=10.0, gt=0)
    """Seconds of waiting prompts to a replica, beyond which there should be another one."""

    @model_validator(mode="after")
    def check(self) -> RayOptions:
        """Refuse what no replica could start with."""
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than min_replicas "
                             f"{self.min_replicas}")
        if {"host", "port"} & self.server.keys():
            raise ValueError("host and port are Ray's; set them with serve start --http-host, "
                             "--http-port")
        try:
            self.engine_config(), self.serve_config()
        except TypeError as error:
            raise ValueError(f"{error}; see EngineConfig and ServeConfig") from None
        return self

    def engine_config(self) -> EngineConfig:
        """Return the configuration of each replica's engine."""
        return EngineConfig(model=self.model, **self.engine)

    def serve_config(self) -> ServeConfig:
        """Return the configuration of each replica's application."""
        lists = {name: tuple(value) for name, value in self.server.items()
                 if isinstance(value, list)}
        return ServeConfig(host=PUBLIC, **{**self.server, **lists})

    def resources(self) -> dict[str, float]:
        """Return what Ray has to reserve for a replica: a GPU for each rank, or a core for each
        thread."""
        config = self.engine_config()
        if config.device == "cpu":
            return {"num_cpus": float(config.num_ranks * (config.num_threads or 1))}
        return {"num_cpus": 1.0, "num_gpus": float(config.num_ranks)}


class Replica:
    """One server with its engine, in an actor of Ray's."""

    def __init__(self, options: RayOptions, engine: AsyncEngine | None = None) -> None:
        config = options.serve_config()
        self._engine = engine or AsyncEngine(options.engine_config())
        self._app = create_app(self._engine, config)
        self._target_wait_s = options.target_wait_s

    async def load(self) -> None:
        """Start the engine and wait until it serves. Raises `LongspanError` where it cannot."""
        await self._engine.start()
        async with asyncio.timeout(LOAD_S):
            while self._engine.status().state == "loading":
                await asyncio.sleep(POLL_S)
        self.check_health()

    async def close(self) -> None:
        """End the engine and its processes."""
        await self._engine.close()

    def application(self) -> FastAPI:
        """Return what answers requests."""
        return self._app

    def check_health(self) -> None:
        """Raise where the engine is dead, a rank of it included: Ray starts another replica."""
        status = self._engine.status()
        if status.state == "dead":
            raise LongspanError(f"the engine has stopped: {status.reason or 'no reason is known'}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell how many replicas this one's work would keep busy: by the time that its waiting
        prompts take, or by how many of the places for running requests are taken."""
        service: Service = self._app.state.service
        status = self._engine.status()
        taken = status.num_running / status.max_num_requests if status.max_num_requests else 0.0
        return {SHARE: max(taken, service.gate.backlog_s() / self._target_wait_s)}


class ScalingContext(Protocol):
    """What is used here of Ray's `AutoscalingContext`."""

    current_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """By name what each replica has reported."""


def wanted_replicas(context: ScalingContext) -> tuple[int, dict[str, Any]]:
    """Return as many replicas as the work of all of them would keep busy: a policy of Ray Serve's.
    Requests are not counted: one prompt may be a thousand times another's length."""
    shares = (context.aggregated_metrics or {}).get(SHARE)
    if not shares:
        return max(1, context.current_num_replicas), {}
    return max(1, math.ceil(sum(shares.values()) - 1e-9)), {}


def app(args: Mapping[str, Any] | RayOptions) -> Any:
    """Build the application that Ray Serve deploys.

    Args:
        args: fields of `RayOptions`, as Ray hands them on: it makes a model of them only where an
            annotation is the class itself, and here annotations are text.

    Raises `pydantic.ValidationError` for wrong ones, `MissingDependencyError` without Ray.
    """
    options = RayOptions.model_validate(args)
    try:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
    except ImportError:
        raise MissingDependencyError(
            "Ray Serve is not installed; pip install 'longspan[ray]'") from None

    class Server(Replica):
        """The same, as Ray calls it."""

        async def __init__(self, options: RayOptions) -> None:  # type: ignore[misc]
            super().__init__(options)
            await self.load()

        def __serve_build_asgi_app__(self) -> FastAPI:
            return self.application()

        async def __del__(self) -> None:
            await self.close()

    return serve.deployment(
        serve.ingress()(Server), name="longspan", ray_actor_options=options.resources(),
        max_ongoing_requests=options.serve_config().max_connections,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas, max_replicas=options.max_replicas,
            policy=AutoscalingPolicy(policy_function=wanted_replicas))).bind(options)
