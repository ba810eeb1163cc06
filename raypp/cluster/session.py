"""Connect to the Ray cluster in RAY_ADDRESS, or start Ray on this machine.

A Ray that starts here listens on loopback and requires a token. One port of each Serve replica is an exception: Ray
opens it on all interfaces.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray._private import ray_constants

from raypp.cluster import ray_logs
from raypp.utils import runtime
from raypp.utils.errors import ConfigError, first_line
from raypp.utils.progress import ProgressListener

CONNECT_TIMEOUT = 10.0  # seconds
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
    """Raise ConfigError if no cluster answers at RAY_ADDRESS; Ray would retry for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
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
    if os.environ.get("RAY_ADDRESS"):
        check_address()
        try:
            ray.init(address="auto", **ray_logs.init_options())
        except (ConnectionError, RuntimeError) as error:
            address = os.environ["RAY_ADDRESS"]
            raise ConfigError(f"no Ray cluster answers at RAY_ADDRESS {address!r}: {error}") from error
    else:
        _start()
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
        _started_here = False


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
    # Ray 2.60 replaces a loopback address by the machine's address where clusters are enabled (not on Windows and
    # macOS). This one shall listen on loopback only, also for metrics, which require no token.
    clusters_enabled = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
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
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters_enabled
    _started_here = True
