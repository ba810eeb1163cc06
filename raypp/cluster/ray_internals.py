"""Interfaces of Ray that its documentation does not promise. Every use of one in raypp is listed here.

``tests/cluster/test_ray_internals.py`` names a test for each. It fails when Ray changes or removes the interface, or
when another module uses what Ray marks as private. Some modules keep theirs, because this one imports Ray or parts of
raypp that they do without:

- :mod:`raypp.utils.device` reads ``RuntimeContext.worker.mode``: no public function tells drivers from workers.
- :func:`raypp.utils.errors.reported_error` reads tracebacks: Serve and Ray Data keep no other trace of an error.
- :mod:`raypp.training.checkpoint` names the file in which Ray Train lists checkpoints; tests resume runs with and
  without it.
- :mod:`raypp.serve.haproxy` patches Serve's configuration of HAProxy and sets its environment variables: Serve has no
  settings for addresses and files.
- :mod:`raypp.cluster.spot_notice` calls the hidden command ``ray drain-node``: no public one announces the end of
  a node.
- :mod:`raypp.cluster.search_progress` ends a search by an exception in ``Callback.on_step_begin``. ``Stopper.stop_all``
  terminates the unfinished trials, which a resumed search would then skip.

Ray marks ``TrainContext.get_storage`` (:mod:`raypp.cluster.train_reporter`) and Tune's ``Trial`` as interfaces for
developers. Elsewhere raypp reads only attributes of a trial that the class documents: ``trial_id`` and ``config``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.utils import read_ray_address

from raypp.utils.storage import JOBS_FOLDER

__all__ = [
    "ENVIRONMENT",
    "HEAD",
    "JOBS_FOLDER",
    "JOB_DRIVER",
    "has_ended",
    "http_host",
    "is_running",
    "loopback_only",
    "processes_ended",
    "reserved_resources",
    "skip_second_checkpoint",
    "started_address",
    "trial_error",
]
# JOBS_FOLDER: the public `RuntimeContext.runtime_env.working_dir()` has the package's URI, and Storage imports no Ray.

JOB_DRIVER = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable of a job's driver: no public function tells whether a process is one.

A variable of ours in ``jobs/runtime_env.yaml`` would be in the workers too, and not in jobs without that file.
"""

HEAD = "node:__internal_head__"
"""Resource of the head node: Tune accepts no trial without resources, and a label reserves none."""

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "train/v2/_internal/constants.py",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "train/v2/_internal/constants.py",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "data/_internal/datasource_v2/formats/parquet/footer_file_indexer.py",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "serve/_private/constants.py",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "serve/_private/constants.py",
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


def reserved_resources() -> dict[str, float]:
    """Resources of this job's placement groups that Ray has placed.

    The public table of placement groups lacks their jobs; the ID of a group ends with its job's.
    """
    job = ray.get_runtime_context().get_job_id()
    reserved: Counter[str] = Counter()
    for group in ray.util.placement_group_table().values():
        if group["state"] == "CREATED" and group["placement_group_id"].endswith(job):
            for bundle in group["bundles"].values():
                reserved.update(bundle)
    return dict(reserved)


def is_running(trial: Any) -> bool:
    """Whether a trial runs: Tune's callbacks receive trials, which Ray documents for developers only."""
    return bool(trial.status == "RUNNING")


def has_ended(trial: Any) -> bool:
    """Whether a trial has ended, with or without an error."""
    return trial.status in ("TERMINATED", "ERROR")


def skip_second_checkpoint(trial: Any, result: dict[str, Any]) -> None:
    """Have Tune register no checkpoint of a result whose checkpoint the population's scheduler stores already.

    Tune has no other means against it, and would count the checkpoint twice.
    """
    from ray.tune.result import SHOULD_CHECKPOINT

    if trial.is_saving:
        result[SHOULD_CHECKPOINT] = False


def trial_error(trial: Any) -> BaseException | None:
    """Why a trial failed: ``ResultGrid.errors`` has it only after the search."""
    error: BaseException | None = trial.get_pickled_error() or trial.get_error()
    return error
