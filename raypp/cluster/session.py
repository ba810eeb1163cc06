"""Connect to the Ray cluster in RAY_ADDRESS, or start Ray on this machine.

A Ray that starts here listens on loopback and requires a token. One port of each Serve replica is an exception: Ray
opens it on all interfaces.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from raypp.cluster import ray_logs
from raypp.cluster.ray_internals import loopback_only, processes_ended, started_address
from raypp.utils import runtime
from raypp.utils.errors import ConfigError, first_line
from raypp.utils.network import is_loopback
from raypp.utils.progress import ProgressListener

CONNECT_TIMEOUT = 10.0  # seconds
PROBE_TIMEOUT = 0.5  # seconds, of a Ray on this machine
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
logger = logging.getLogger(__name__)
_started_here = False

if TYPE_CHECKING:
    from raypp.config.schema import Cluster


def uses_gpu(cluster: Cluster, resources: dict[str, float]) -> bool:
    """Whether tasks use GPUs: by default if the cluster has any."""
    return resources.get("GPU", 0) > 0 if cluster.gpu is None else cluster.gpu


def may_grow() -> bool:
    """Whether the cluster may grow; a Ray that started here does not."""
    return not _started_here


def resource_warning(sentence: str, see: str) -> str:
    """The warning that Ray waits for resources, if the cluster may grow.

    Raises:
        ConfigError: Ray would wait forever.
    """
    if may_grow():
        return f"{sentence}: waiting for it to grow"
    raise ConfigError(f"{sentence}; see {see}")


def check_resources(
    subject: str, num_cpus: float, num_gpus: float, resources: dict[str, float], display: ProgressListener
) -> None:
    """Show a warning as of :func:`resource_warning` for each kind of resource that the cluster lacks.

    Args:
        subject: with its verb, such as "a task needs".
    """
    for kind, amount in (("CPU", num_cpus), ("GPU", num_gpus)):
        if amount > resources.get(kind, 0):
            sentence = f"{subject} {amount:g} {kind}s, the cluster has {resources.get(kind, 0):g}"
            display.warn(resource_warning(sentence, "cluster.num_workers, cluster.cpus_per_worker and cluster.gpu"))


def metrics_url() -> str | None:
    """Metrics endpoint of a Ray that started here; None on another cluster."""
    if not _started_here:
        return None
    (node,) = (node for node in ray.nodes() if node["Alive"])
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def check_address() -> None:
    """Raise ConfigError if RAY_ADDRESS is of Ray Client, or no cluster answers there; Ray would retry for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}, and Ray Train does not work through Ray Client; submit the command as a job "
            "instead: ray job submit --address http://HOST:8265 --working-dir . -- raypp ..."
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:  # "auto", or unset
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS {address!r}: {reason}; without it raypp starts a Ray here"
        ) from error


def has_ray_ended() -> bool:
    """Whether the Ray that started here has ended, as after a signal to all processes of the command's group."""
    return _started_here and processes_ended()


@contextmanager
def ray_session() -> Iterator[dict[str, float]]:
    """Use the running Ray, connect to RAY_ADDRESS, or start Ray here and stop it at the end.

    Yields:
        the cluster's total resources, such as ``{"CPU": 2.0}``.

    Raises:
        ConfigError: Ray does not start here, or RAY_ADDRESS cannot be reached.
    """
    global _started_here
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    with ExitStack() as stack:
        if os.environ.get("RAY_ADDRESS"):
            check_address()
            try:
                ray.init(address="auto", **ray_logs.init_options())
            except (ConnectionError, RuntimeError) as error:
                address = os.environ["RAY_ADDRESS"]
                raise ConfigError(f"no Ray cluster answers at RAY_ADDRESS {address!r}: {error}") from error
        else:
            stack.enter_context(_without_watcher())
            _start()
        try:
            yield ray.cluster_resources()
        finally:
            with ray_logs.hidden_errors():
                ray.shutdown()
            _started_here = False


@contextmanager
def _without_watcher() -> Iterator[None]:
    """Let Ray Train start no process that watches for nodes about to leave, unless the user has configured it."""
    if WATCHER in os.environ:
        yield
        return
    os.environ[WATCHER] = "0"
    try:
        yield
    finally:
        del os.environ[WATCHER]


def _create_token() -> None:
    """Create a token for a Ray that starts here, unless the user has configured one.

    Ray would write a token to the user's home. Every later `ray start` would then require it, and refuse clients such
    as `serve deploy` until RAY_AUTH_MODE is set.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(name in os.environ for name in names) and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # until this process ends


def _start() -> None:
    global _started_here
    _create_token()
    if (running := _running_address()) is not None:
        logger.warning("starting a Ray for this command; RAY_ADDRESS=%s uses the one that runs here", running)
    try:
        with loopback_only():  # also for metrics, which require no token
            ray.init(
                address="local",  # not another cluster on this machine
                num_cpus=runtime.num_cores(),
                include_dashboard=False,
                **ray_logs.init_options(),
            )
    except Exception as error:  # bare, if Ray's processes do not start in time
        ray.shutdown()
        reason = first_line(error)
        raise ConfigError(f"Ray did not start on this machine: {reason}; --local trains without it") from error
    _started_here = True


def _running_address() -> str | None:
    """Address of a Ray of ``ray start`` on this machine; None if there is none.

    One on loopback does not count: it may belong to another raypp, which does not share it.
    """
    address = started_address()
    host, _, port = (address or "").rpartition(":")
    if not port.isdigit() or is_loopback(host):
        return None
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT).close()
    except OSError:  # it has ended
        return None
    return address
