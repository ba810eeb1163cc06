"""Interfaces of Ray that its documentation does not promise. Every use of one in raypp is listed here.

``tests/cluster/test_ray_internals.py`` has a test for each. It fails when Ray changes or removes the interface. Four
modules that run without Ray cannot import this one, and have theirs themselves:

- :mod:`raypp.utils.device` reads ``RuntimeContext.worker.mode``: no public function tells drivers from workers.
- :func:`raypp.utils.errors.reported_error` reads tracebacks: Serve and Ray Data keep no other trace of an error.
- :mod:`raypp.training.checkpoint` names the file in which Ray Train lists checkpoints; tests resume runs with and
  without it.
- :mod:`raypp.serve.haproxy` patches Serve's configuration of HAProxy and sets its environment variables: Serve has no
  settings for addresses and files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import ray_constants
from ray._private.utils import read_ray_address

from raypp.utils.storage import JOBS_FOLDER

__all__ = [
    "ENVIRONMENT",
    "HEAD",
    "JOBS_FOLDER",
    "JOB_DRIVER",
    "http_host",
    "is_running",
    "loopback_only",
    "processes_ended",
    "started_address",
    "trial_error",
]

JOB_DRIVER = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable of a job's driver: no public function tells whether a process is one."""

HEAD = "node:__internal_head__"
"""Resource of the head node: Tune accepts no trial without resources, and a label reserves none."""

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "train/v2/_internal/constants.py",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "train/v2/_internal/constants.py",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "data/_internal/datasource_v2/formats/parquet/footer_file_indexer.py",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "serve/_private/constants.py",
    "RAY_JOB_STOP_WAIT_TIME_S": "dashboard/modules/job/job_supervisor.py",
    "RAY_AIR_NEW_OUTPUT": "tune/experimental/output.py",
    "RAY_worker_niceness": "_private/ray_constants.py",
}
"""Environment variables that Ray's documentation lacks, and the files of Ray that read them.

:mod:`raypp.utils.runtime`, :mod:`raypp.cluster.tune` and ``jobs/runtime_env.yaml`` say why each is set.
"""


@contextmanager
def loopback_only() -> Iterator[None]:
    """Keep a Ray that starts here on the loopback address.

    Where Ray allows clusters (not on Windows and macOS), it replaces a loopback address by the machine's address. It
    has no setting against this.
    """
    clusters_enabled = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters_enabled


def started_address() -> str | None:
    """Address of the Ray that was last started here, which may have ended: Ray has no public function that tells it."""
    address: str | None = read_ray_address()
    return address


def processes_ended() -> bool:
    """Whether a process of the Ray node that this process has started ended: Ray has no public function for it."""
    from ray._private import worker

    node = worker._global_node
    return node is not None and bool(node.dead_processes())


def http_host() -> str:
    """The host of Serve's HTTP proxy: replicas refuse to start without tokens unless it is loopback.

    Serve's configuration does not reach the builder of an application, and ``serve.status()`` lacks the host.
    """
    from ray.serve.context import _get_global_client

    return str(_get_global_client().http_config.host)


def is_running(trial: Any) -> bool:
    """Whether a trial runs: Tune's callbacks receive trials, whose attributes are not documented for users."""
    return bool(trial.status == "RUNNING")


def trial_error(trial: Any) -> BaseException | None:
    """Why a trial failed: ``ResultGrid.errors`` has it only after the search."""
    error: BaseException | None = trial.get_pickled_error() or trial.get_error()
    return error
