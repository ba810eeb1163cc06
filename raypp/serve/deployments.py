"""The services on Ray Serve, as ``serve_config.yaml`` and ``raypp serve`` deploy them."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application, Deployment, metrics
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.exceptions import RayServeException
from torch import Tensor

import raypp
from raypp.bundle.locate import split_choice
from raypp.cluster.ray_internals import JOBS_FOLDER, http_host
from raypp.config.validation import format_validation_error
from raypp.serve.admission import AdmissionControl, Limits
from raypp.serve.api import attack_api, classifier_api
from raypp.serve.attack_catalog import ServedAttack, load_attacks
from raypp.serve.auth import VARIABLE, Tokens, open_tokens
from raypp.serve.batching import DynamicBatcher
from raypp.serve.index import Server
from raypp.serve.inference_thread import InferenceThread
from raypp.serve.loaded_model import Inference, LoadedModel, classify
from raypp.serve.model_store import ModelManager
from raypp.serve.monitoring import EXPORT_SECONDS, ReplicaMetrics
from raypp.serve.scaling import BUSY, MAX_WAITING, WAITING_IMAGES, scale_by_images
from raypp.utils.errors import ConfigError, RayppError, first_line
from raypp.utils.network import is_loopback
from raypp.utils.paths import resolve_path

logger = logging.getLogger("raypp.serve")
BUNDLE_VARIABLE = "RAYPP_BUNDLE"  # environment variable: the bundle where args.bundle is absent
MIN_POLL_INTERVAL_S = 0.5  # between two polls that requests cause
# Python switches threads every 5 ms by default. The inference thread needs the interpreter after every operation, and
# the thread that reads requests would delay it by that time.
SWITCH_INTERVAL_S = 0.0002
TOKEN_SECONDS = 0.1  # between two looks at the token file
STATUS_SECONDS = 2.0  # lifetime of the cached list of running applications
HANG_FACTOR = 4  # a computation longer than this many request timeouts is considered hung


class DeploymentConfig(BaseModel):
    """The ``args`` of an application in ``serve_config.yaml``."""

    model_config = ConfigDict(extra="forbid")

    bundle: str = Field(default_factory=lambda: os.environ.get(BUNDLE_VARIABLE, ""))
    """A bundle, a model repository, a run or a search on any storage; by default ``RAYPP_BUNDLE``, see
    :func:`raypp.bundle.locate.locate_bundle` and :func:`located`."""
    tokens: str | None = None
    """Path or URI of a token file (see ``raypp token``), or ``env:NAME`` of an environment variable that holds its
    text; required unless the service listens on loopback."""
    max_body: int = Field(Limits.body, ge=1024)
    """Bytes of one request."""
    max_images: int = Field(Limits.images, ge=1)
    """Images of one request, and of one batch of the classifier."""
    look_every_s: float = Field(2.0, gt=0)
    """Interval between two polls of the model repository, in seconds."""
    max_waiting: int = Field(Limits.waiting, ge=1)
    """Images that wait for a replica's classifier; more are refused with 503."""
    timeout_s: float = Field(Limits.seconds, gt=0)
    """Timeout of a request, in seconds."""
    threads: int = Field(1, ge=1)
    """Threads of torch in each replica."""


class _Replica:
    """A replica of either service: the active model, an inference thread, a polling task and an exporting task."""

    waiting: AdmissionControl | None = None  # of the classifier

    def __init__(self, config: DeploymentConfig, prepare: Callable[[LoadedModel], Any] | None = None) -> None:
        _log_as_serve()
        torch.set_num_threads(config.threads)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.config = config
        self.limits = Limits(config.max_body, config.max_images, config.timeout_s, waiting=config.max_waiting)
        host = http_host()
        if config.tokens is None and not is_loopback(host):
            raise ConfigError(
                f"the service listens on {host!r}, where others can reach it, and has no token file; set args.tokens "
                "(see raypp token), or http_options.host to 127.0.0.1"
            )
        self._tokens = open_tokens(config.tokens) if config.tokens is not None else None
        self._valid_tokens = self._tokens.current() if self._tokens is not None else None
        self._token_expiry = 0.0  # monotonic seconds
        self.live = ModelManager(config.bundle, prepare)
        model = self.live.active
        logger.warning("serving bundle %s, version %s", model.location, model.version)
        if model.guard is None:
            logger.warning("bundle %s has no guard: plain images are not refused", model.version)
        self._inference = InferenceThread()
        self._tasks: list[asyncio.Task[None]] = []
        self._refresh: asyncio.Future[bool] | None = None
        self.metrics = ReplicaMetrics(metrics)

    async def tokens(self) -> Tokens | None:
        # In a thread: the file may be on network storage, and reading it would block all requests. Not for each
        # request: a change of threads takes longer than the check of a token.
        if self._tokens is not None and time.monotonic() > self._token_expiry:
            self._token_expiry = time.monotonic() + TOKEN_SECONDS  # requests that come meanwhile do not look too
            self._valid_tokens = await asyncio.to_thread(self._tokens.current)
        return self._valid_tokens

    async def find_model(self, protection: str | None) -> LoadedModel | None:
        model = self.live.get(protection)
        # It may have just been published. The minimum interval bounds the reads that unknown protections cause.
        is_loading = self._refresh is not None and not self._refresh.done()
        if model is None and (is_loading or time.monotonic() - self.live.last_poll > MIN_POLL_INTERVAL_S):
            await self._refresh_once()
            model = self.live.get(protection)
        return model

    async def _refresh_once(self) -> bool:
        """Refresh the model; concurrent calls share one refresh, which may take long."""
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.ensure_future(asyncio.to_thread(self.live.refresh))
        return await asyncio.shield(self._refresh)

    async def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the inference thread."""
        return await self._inference.run(function, *arguments)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.config.look_every_s)
            before = self.live.rejected
            if await self._refresh_once():
                logger.warning("bundle %s, version %s, is active", self.live.active.location, self.live.active.version)
            elif self.live.rejected is not None and self.live.rejected != before:
                logger.error("version %(version)s is rejected: %(reason)s", self.live.rejected)

    async def _export(self) -> None:
        while True:
            self.metrics.export(self.live.active, None if self.waiting is None else self.waiting.num_images)
            await asyncio.sleep(EXPORT_SECONDS)

    async def check_health(self) -> None:
        if not self._tasks:  # Serve calls this method in the event loop before the first request
            self._tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._export())]
        # Not in the inference thread: it would wait behind slow attacks until Serve kills the replica.
        problem = await asyncio.to_thread(self.live.active.private.problem)
        if problem is not None:
            raise RuntimeError(f"the classifier fails its self-check: {problem}")
        if (seconds := self._inference.seconds_running()) > HANG_FACTOR * self.limits.seconds:
            raise RuntimeError(f"one computation has taken {seconds:.0f} s")


def _log_as_serve() -> None:
    """Log to the handlers and in the format of Serve's own logger."""
    serve_logger = logging.getLogger("ray.serve")
    logger.handlers, logger.propagate = serve_logger.handlers, False
    logger.setLevel(serve_logger.getEffectiveLevel())


def _replica() -> Any:
    return serve.get_replica_context().servable_object


def _observe(route: str, status: int, num_images: int, seconds: float) -> None:
    _replica().metrics.count_request(route, status, num_images, seconds)


def _classifier_app() -> Server:
    return Server(classifier_api(_replica, _observe), RunningApplications().names, _observe)


def _attack_app() -> FastAPI:
    return attack_api(_replica, _observe)


class RunningApplications:
    """The names of Serve's running applications, cached for ``STATUS_SECONDS``."""

    def __init__(self) -> None:
        self._names: Collection[str] = ()
        self._expiry = 0.0
        self._lock = asyncio.Lock()

    async def names(self) -> Collection[str]:
        async with self._lock:
            if time.monotonic() > self._expiry:
                applications = (await asyncio.to_thread(serve.status)).applications
                self._names = [name for name, status in applications.items() if status.status == "RUNNING"]
                self._expiry = time.monotonic() + STATUS_SECONDS
        return self._names


@serve.deployment(
    name="Classifier",
    max_ongoing_requests=128,
    max_queued_requests=256,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
    autoscaling_config=AutoscalingConfig(
        min_replicas=1,
        max_replicas=8,
        target_ongoing_requests=48,
        upscale_delay_s=10,
        policy=AutoscalingPolicy(policy_function=scale_by_images),
    ),
    ray_actor_options={"num_cpus": 1},
    health_check_period_s=5,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=40,
)
@serve.ingress(_classifier_app)
class ClassifierDeployment(_Replica):
    """Classifies protected images in batches across requests."""

    def __init__(self, config: DeploymentConfig) -> None:
        super().__init__(config)
        self.waiting: AdmissionControl = AdmissionControl(self.limits.waiting)
        self._batcher = DynamicBatcher(self.compute, self._classify, config.max_images)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The statistics of :func:`raypp.serve.scaling.scale_by_images`; Serve calls this every few seconds."""
        waiting, limit, busy = self.waiting.num_images, self.waiting.max_images, self._inference.busy_share()
        return {WAITING_IMAGES: waiting, MAX_WAITING: limit, BUSY: busy}

    def _classify(self, jobs: list[Inference]) -> list[tuple[Tensor, Tensor]]:
        self.metrics.count_batch(sum(len(images) for _, images in jobs))
        return classify(jobs)

    async def predict(self, model: LoadedModel, images: Tensor) -> tuple[Tensor, Tensor]:
        return await self._batcher.submit((model, images))


@serve.deployment(
    name="Attack",
    max_ongoing_requests=8,
    max_queued_requests=16,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=2),
    autoscaling_config=AutoscalingConfig(min_replicas=1, max_replicas=2, target_ongoing_requests=2),
    ray_actor_options={"num_cpus": 0.5},
    health_check_period_s=10,
    health_check_timeout_s=60,
    graceful_shutdown_timeout_s=40,
)
@serve.ingress(_attack_app)
class AttackDeployment(_Replica):
    """Reconstructs plain images with the attacks stored in a bundle."""

    def __init__(self, config: DeploymentConfig) -> None:
        super().__init__(config, prepare=load_attacks)

    async def reconstruct(self, attack: ServedAttack, images: Tensor) -> Tensor:
        estimates: Tensor = await self.compute(attack.run, images)
        return estimates


def located(location: str, hint: str = "") -> str:
    """Resolve a path of ``serve_config.yaml``, relative to Ray's start folder or else to the checkout.

    Raises ConfigError, whose message ends with ``hint``, if the path does not exist.
    """
    try:
        uri = resolve_path(location)
    except ValueError as error:
        raise ConfigError(f"a location is not understood: {error}") from error
    if "://" in uri or Path(location).expanduser().is_absolute():
        return uri
    folders = list(dict.fromkeys((Path(resolve_path(".")), Path(raypp.__file__).parent.parent)))
    for folder in folders:
        if Path(split_choice(folder / location)[0]).exists():
            return str(folder / location)
    raise ConfigError(f"there is no {location!r} in {' or in '.join(map(str, folders))}{hint}")


def build_classifier(args: dict[str, Any]) -> Application:
    """Build the application ``classifier`` for ``serve deploy``."""
    return _build("classifier", args)


def build_attack(args: dict[str, Any]) -> Application:
    """Build the application ``attack`` for ``serve deploy``."""
    return _build("attack", args)


def bind(name: str, config: DeploymentConfig, overrides: Iterable[dict[str, Any]] = ()) -> Application:
    """Create an application; raises ConfigError if its token file is missing or damaged, before any replica starts.

    Args:
        overrides: as ``deployments`` in ``serve_config.yaml``.
    """
    if config.tokens is not None:
        Tokens.read(config.tokens)
    application: Application = deployment(name, overrides).bind(config)
    return application


def deployment(name: str, overrides: Iterable[dict[str, Any]] = ()) -> Deployment:
    """The deployment of an application, with the options of ``overrides`` that have its name."""
    deployments: dict[str, Deployment] = {"classifier": ClassifierDeployment, "attack": AttackDeployment}
    result = deployments[name]
    for options in overrides:
        if options["name"] == result.name:
            result = result.options(**options)
    return result


COPIED = (
    "bundle %s lies in a copy of a folder that Ray made, so later runs do not replace it; use an absolute path, or set "
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 where `uv run ray start --block` made the copy"
)
NO_SETTING = f"bundle is missing; set it, or {BUNDLE_VARIABLE} in the environment of every node's `ray start`"
NO_BUNDLE = "; `raypp quickstart` makes a first bundle, and `bundle` in serve_config.yaml names another one"


def _build(name: str, args: dict[str, Any]) -> Application:
    """Build an application and load its bundle once, so that ``serve status`` shows an error as one sentence."""
    try:
        config = DeploymentConfig.model_validate(args)
        if not config.bundle and "bundle" not in args:
            raise ConfigError(NO_SETTING)
        tokens = config.tokens
        if tokens is not None and not tokens.startswith(VARIABLE):
            tokens = located(tokens)
        config = config.model_copy(update={"bundle": located(config.bundle, NO_BUNDLE), "tokens": tokens})
        application = bind(name, config)
        model = ModelManager(config.bundle).active
    except ValidationError as error:
        reason = format_validation_error(error, args, root=DeploymentConfig)
        raise RayServeException(f"args of {name}: {reason}") from None
    except RayppError as error:
        raise RayServeException(f"args of {name}: {error}") from None
    except Exception as error:  # the loader of a damaged bundle can raise anything
        reason = f"bundle {config.bundle!r} cannot be loaded: {first_line(error)}"
        raise RayServeException(f"args of {name}: {reason}") from error
    _log_as_serve()
    logger.warning("%s serves bundle %s, version %s", name, model.location, model.version)
    if JOBS_FOLDER in model.location:
        logger.warning(COPIED, model.location)
    return application
