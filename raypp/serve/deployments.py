"""The services on Ray Serve: what ``serve_config.yaml`` and ``raypp serve`` deploy."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.serve.metrics import Counter, Histogram
from torch import Tensor

import raypp
from raypp.config.validation import format_validation_error
from raypp.serve.admission import AdmissionControl, Limits
from raypp.serve.api import AttackCatalog, ServedAttack, attack_api, build_catalog, classifier_api
from raypp.serve.attack_catalog import load_attacks
from raypp.serve.auth import TokenFile, Tokens
from raypp.serve.batching import DynamicBatcher
from raypp.serve.index import Server
from raypp.serve.loaded_model import LoadedModel, classify
from raypp.serve.model_store import ModelManager
from raypp.utils.errors import ConfigError, RayppError, first_line
from raypp.utils.network import is_loopback
from raypp.utils.paths import resolve_path
from raypp.utils.storage import JOBS_FOLDER

logger = logging.getLogger("raypp.serve")
MIN_POLL_INTERVAL_S = 0.5  # between two looks for newer bundles that requests cause
# Between two turns of Python's threads, 5 ms by itself: the thread that computes asks for a turn after every operation,
# and the one that reads requests would keep it waiting for as long each time.
SWITCH_INTERVAL_S = 0.0002
STATUS_SECONDS = 2.0  # for which Serve's own list of what runs is kept
HANG_FACTOR = 4  # times as long as a request may take: a computation of that length ends no more
STATUS_BOUNDARIES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]


class DeploymentConfig(BaseModel):
    """What both services are built from: the ``args`` of an application in ``serve_config.yaml``."""

    model_config = ConfigDict(extra="forbid")

    bundle: str
    """A bundle, or a shelf of published ones (see ``raypp publish``), on any storage path; see :func:`located`."""
    tokens: str | None = None
    """Path of a token file (see ``raypp token``); needed where the service can be reached from elsewhere."""
    max_body: int = Field(Limits.body, ge=1024)
    """Bytes of one request."""
    max_images: int = Field(Limits.images, ge=1)
    """Images of one request, and of one pass through the classifier."""
    look_every_s: float = Field(2.0, gt=0)
    """How often to look whether another bundle has become live."""
    max_waiting: int = Field(Limits.waiting, ge=1)
    """Images that wait for a replica's classifier; with more it answers 503."""
    timeout_s: float = Field(Limits.seconds, gt=0)
    """Until a request is given up."""
    threads: int = Field(1, ge=1)
    """Of torch, in each replica."""

    def limits(self) -> Limits:
        return Limits(self.max_body, self.max_images, self.timeout_s, waiting=self.max_waiting)


class _Replica:
    """What a replica of either service is: a live bundle, one thread that computes, and a look for newer bundles."""

    def __init__(self, arguments: DeploymentConfig) -> None:
        _log_as_serve()
        torch.set_num_threads(arguments.threads)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.arguments, self.limits = arguments, arguments.limits()
        host = _listens_on()
        if arguments.tokens is None and not is_loopback(host):
            raise ConfigError(
                f"the service listens on {host!r}, where others can reach it, and has no token file: set args.tokens "
                "(see raypp token), or http_options.host to 127.0.0.1"
            )
        self._tokens = TokenFile(arguments.tokens) if arguments.tokens is not None else None
        self.live = ModelManager(arguments.bundle, prepare=self.prepares())
        logger.warning("bundle %s, version %s, is served", self.live.now.location, self.live.now.version)
        if self.live.now.guard is None:
            logger.warning("bundle %s has no guard: plain images are not refused", self.live.now.version)
        self._computer = ThreadPoolExecutor(1, "raypp-compute")
        self._began: float | None = None  # when what is being computed was begun
        self._looker: asyncio.Task[None] | None = None
        self._refresh: asyncio.Future[bool] | None = None
        tags = ("route", "status")
        self._requests = Counter("raypp_requests_total", "Requests answered.", tags)
        self._images = Counter("raypp_images_total", "Images of answered requests.", tags)
        self._seconds = Histogram("raypp_request_ms", "Time to answer.", STATUS_BOUNDARIES, ("route",))

    def prepares(self) -> Callable[[LoadedModel], Any] | None:
        """What makes of a bundle what this service needs, before it takes over."""
        return None

    async def tokens(self) -> Tokens | None:
        # In a thread: the file may lie on a network, and looking at it would hold up every other request.
        return await asyncio.to_thread(self._tokens.now) if self._tokens is not None else None

    def now(self) -> LoadedModel:
        return self.live.now

    async def served(self, protection: str | None) -> LoadedModel | None:
        found = self.live.of(protection)
        # Perhaps it has just been published; who asks for what was never there shall not have storage read each time.
        loading = self._refresh is not None and not self._refresh.done()  # perhaps what is asked for
        if found is None and (loading or time.monotonic() - self.live.looked > MIN_POLL_INTERVAL_S):
            await self._refreshed()
            found = self.live.of(protection)
        return found

    async def _refreshed(self) -> bool:
        """Look for a newer bundle once for all who wait for it: loading takes long, and a thread each would be many."""
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.ensure_future(asyncio.to_thread(self.live.refresh))
        return await asyncio.shield(self._refresh)

    def rejected(self) -> dict[str, str] | None:
        return self.live.rejected

    def observe(self, route: str, status: int, num_images: int, seconds: float) -> None:
        self._requests.inc(1, {"route": route, "status": str(status)})
        if num_images:
            self._images.inc(num_images, {"route": route, "status": str(status)})
        self._seconds.observe(1000 * seconds, {"route": route})

    async def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the thread that computes; requests are read and answered meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._computer, self._timed, function, *arguments)

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._began = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self._began = None

    def look(self) -> None:
        """Look for newer bundles from now on; called once there is an event loop."""
        if self._looker is None:
            self._looker = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self.arguments.look_every_s)
            before = self.live.rejected
            # Not in the thread that computes: loading takes long, and requests go on meanwhile.
            if await self._refreshed():
                logger.warning("bundle %s, version %s, is live", self.live.now.location, self.live.now.version)
            elif self.live.rejected is not None and self.live.rejected != before:
                logger.error("bundle %(version)s is not taken over: %(reason)s", self.live.rejected)

    async def check_health(self) -> None:
        self.look()
        # Not in the thread that computes: behind slow attacks it would come too late, and Serve end a sound replica.
        problem = await asyncio.to_thread(self.live.now.private.problem)
        if problem is not None:
            raise RuntimeError(f"the classifier fails its self-check: {problem}")
        began = self._began
        if began is not None and time.monotonic() - began > HANG_FACTOR * self.limits.seconds:
            raise RuntimeError(f"one computation has taken {time.monotonic() - began:.0f} s")


def _log_as_serve() -> None:
    """Write our lines where Serve writes a replica's, in its format."""
    serving = logging.getLogger("ray.serve")
    logger.handlers, logger.propagate = serving.handlers, False
    logger.setLevel(serving.getEffectiveLevel())


def _listens_on() -> str:
    """The address that Serve's HTTP proxy listens on; Serve tells it nowhere in public, so its own record is asked."""
    from ray.serve.context import _get_global_client

    return str(_get_global_client().http_config.host)


def _servable() -> Any:
    return serve.get_replica_context().servable_object


def _observe(route: str, status: int, num_images: int, seconds: float) -> None:
    _servable().observe(route, status, num_images, seconds)


def _classifier_app() -> Server:
    return Server(classifier_api(_servable, _observe), Running().names, _observe)


def _attack_app() -> FastAPI:
    return attack_api(_servable, _observe)


class Running:
    """The names of the applications that Serve runs, asked for at most every two seconds, however many ask."""

    def __init__(self) -> None:
        self._names: Collection[str] = ()
        self._until = 0.0
        self._lock = asyncio.Lock()

    async def names(self) -> Collection[str]:
        async with self._lock:
            if time.monotonic() > self._until:
                applications = (await asyncio.to_thread(serve.status)).applications
                self._names = [name for name, about in applications.items() if about.status == "RUNNING"]
                self._until = time.monotonic() + STATUS_SECONDS
        return self._names


@serve.deployment(
    name="Classifier",
    max_ongoing_requests=128,
    max_queued_requests=256,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
    autoscaling_config=AutoscalingConfig(min_replicas=1, max_replicas=8, target_ongoing_requests=48),
    ray_actor_options={"num_cpus": 1},
    health_check_period_s=5,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=40,
)
@serve.ingress(_classifier_app)
class ClassifierDeployment(_Replica):
    """Classifies protected images in batches that requests share."""

    def __init__(self, arguments: DeploymentConfig) -> None:
        super().__init__(arguments)
        self.waiting = AdmissionControl(self.limits.waiting)
        self._batches = DynamicBatcher(self.compute, classify, arguments.max_images)

    async def predict(self, served: LoadedModel, images: Tensor) -> tuple[Tensor, Tensor]:
        self.look()
        return await self._batches.answer((served, images))


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
    """Reconstructs plain images with the attacks that a bundle keeps of its attack run."""

    def prepares(self) -> Callable[[LoadedModel], Any]:
        return lambda served: build_catalog(served, load_attacks(served))

    async def offered(self, protection: str | None) -> AttackCatalog | None:
        served = await self.served(protection)
        found: AttackCatalog | None = self.live.prepared(served) if served is not None else None
        return found

    async def reconstruct(self, attack: ServedAttack, images: Tensor) -> Tensor:
        self.look()
        found: Tensor = await self.compute(attack.run, images)
        return found


def build_classifier(args: dict[str, Any]) -> Application:
    """The application ``classifier``, for ``serve deploy``: ``args`` is what stands in the file."""
    return _built("classifier", args)


def build_attack(args: dict[str, Any]) -> Application:
    """The application ``attack``, likewise."""
    return _built("attack", args)


DEPLOYMENTS: dict[str, Any] = {"classifier": ClassifierDeployment, "attack": AttackDeployment}


def bind(name: str, arguments: DeploymentConfig) -> Application:
    """The application of one of ``DEPLOYMENTS``.

    Raises:
        ConfigError: the token file is missing or damaged; here, not in every replica.
    """
    if arguments.tokens is not None:
        Tokens.read(arguments.tokens)
    application: Application = DEPLOYMENTS[name].bind(arguments)
    return application


COPIED = (
    "bundle %s lies in a copy of a folder that Ray made, so a later run does not take its place: name the bundle by an "
    "absolute path, or set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 where `uv run ray start --block` made the copy"
)
NO_BUNDLE = "; `raypp quickstart` makes a first bundle, and `bundle` in serve_config.yaml names another one"


def _built(name: str, args: dict[str, Any]) -> Application:
    """An application, its bundle loaded once here, so that what is wrong is one sentence in ``serve status``."""
    try:
        arguments = DeploymentConfig.model_validate(args)
        arguments = arguments.model_copy(
            update={
                "bundle": located(arguments.bundle, NO_BUNDLE),
                "tokens": located(arguments.tokens) if arguments.tokens is not None else None,
            }
        )
        application = bind(name, arguments)
        served = ModelManager(arguments.bundle).now
    except ValidationError as error:
        raise RayServeException(
            f"args of {name}: {format_validation_error(error, args, root=DeploymentConfig)}"
        ) from None
    except RayppError as error:
        raise RayServeException(f"args of {name}: {error}") from None
    except Exception as error:  # whatever a damaged bundle makes its loader raise
        raise RayServeException(
            f"args of {name}: bundle {arguments.bundle!r} cannot be loaded: {first_line(error)}"
        ) from error
    _log_as_serve()
    logger.warning("%s serves bundle %s, version %s", name, served.location, served.version)
    if JOBS_FOLDER in served.location:
        logger.warning(COPIED, served.location)
    return application


def located(location: str, hint: str = "") -> str:
    """A path as ``serve_config.yaml`` means it: absolute, or relative to where Ray was started, else to the checkout.

    Args:
        hint: what the error adds.

    Raises:
        ConfigError: nothing is there.
    """
    try:
        uri = resolve_path(location)
    except ValueError as error:
        raise ConfigError(f"a location is not understood: {error}") from error
    if "://" in uri or Path(location).expanduser().is_absolute():
        return uri
    folders = list(dict.fromkeys((Path(resolve_path(".")), Path(raypp.__file__).parent.parent)))
    for folder in folders:
        if (folder / location).exists():
            return str(folder / location)
    places = " or in ".join(map(str, folders))
    raise ConfigError(f"there is no {location!r} in {places}{hint}")
