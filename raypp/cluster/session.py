"""Connecting to Ray: the cluster that the environment names, or one on this machine.

A Ray that starts here listens on loopback, but for a port of each Serve replica, which Ray opens on all interfaces. It
asks for a token, which Ray makes by itself.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray._private import ray_constants

from raypp.utils import runtime
from raypp.utils.errors import ConfigError, first_line

ANSWER_SECONDS = 10.0
_started_here = False

if TYPE_CHECKING:
    from raypp.config.schema import Cluster


def uses_gpu(cluster: Cluster, have: dict[str, float]) -> bool:
    """Whether work gets GPUs: as configured, else wherever the cluster has some."""
    return have.get("GPU", 0) > 0 if cluster.gpu is None else cluster.gpu


def is_autoscaling() -> bool:
    """Whether somebody else runs the cluster and may add nodes to it: not so for one that was started here."""
    return not _started_here


def insufficient_resources(sentence: str, see: str) -> str:
    """Say at once what Ray would wait for in silence: the warning that it waits, on a cluster that may grow.

    Raises:
        ConfigError: it would wait for ever.
    """
    if is_autoscaling():
        return f"{sentence}: waiting for it to grow"
    raise ConfigError(f"{sentence}; see {see}")


def metrics_url() -> str | None:
    """Where a Ray that was started here gives its metrics; None on somebody else's cluster."""
    if not _started_here:
        return None
    (node,) = (node for node in ray.nodes() if node["Alive"])
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def check_address() -> None:
    """Raise ConfigError if RAY_ADDRESS names a cluster that nobody answers for: Ray itself would try for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:  # "auto", or none
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS {address!r}: {reason}; without it raypp starts a Ray here"
        ) from error


@contextmanager
def ray_session() -> Iterator[dict[str, float]]:
    """Use the running Ray, the cluster in RAY_ADDRESS, or start one here and stop it at the end.

    Yields:
        the cluster's total resources, such as ``{"CPU": 2.0}``.

    Raises:
        ConfigError: Ray does not start here, or the named cluster cannot be reached.
    """
    global _started_here
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    if os.environ.get("RAY_ADDRESS"):
        check_address()
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster answers at RAY_ADDRESS {os.environ['RAY_ADDRESS']!r}: {error}"
            ) from error
    else:
        _start(runtime.num_cores())
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
        _started_here = False


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have the Ray that is started next listen on loopback only, its metrics too, which ask for no token.

    Ray 2.60 takes the machine's address, and turns a loopback address that it is given into that one, unless it runs
    where it forms no clusters (Windows and macOS by default): then it takes loopback for all that it starts.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _bring_token() -> None:
    """Give a Ray that starts here a token of its own, where there is none yet.

    Ray would write one to the user's home, after which every later `ray start` asks for tokens and its clients, such as
    `serve deploy`, are refused until RAY_AUTH_MODE is set.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(name in os.environ for name in names) and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # for as long as this process lives: Ray keeps it


def _start(num_cpus: int) -> None:
    global _started_here
    _bring_token()
    try:
        with _on_loopback():
            ray.init(
                address="local",  # not the cluster of somebody else that Ray would find on this machine
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray raises a bare Exception when its processes do not come up in time
        ray.shutdown()
        raise ConfigError(
            f"Ray did not start on this machine: {first_line(error)}; --local trains without it"
        ) from error
    _started_here = True
