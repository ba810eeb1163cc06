"""Environment variables that torch and Ray read while they are imported, and the cores of this process.

``raypp/__init__.py`` applies them before any other module of raypp is imported. A value that the user has set wins.
"""

from __future__ import annotations

import os

SETTINGS = {
    # Under `uv run` Ray would build a second environment per job: several GB for torch, for nothing on one machine.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Train polls its workers every 2 s by default; at 0.2 s fit() returns 4 to 5 s sooner after the last report.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Workers at nice 15 lose 1.3 to 1.6x of their speed to any other process on a small machine.
    "RAY_worker_niceness": "0",
    # One watcher process fewer per run; it matters only where nodes are pre-empted, and a cluster sets it there.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # One event loop in a replica, not two: ours never waits in it, for what computes has a thread of its own. Single
    # images behind HAProxy gain a third to a half (docs/results.md). Log lines are written at once all the same.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # The first of these also has replicas open HTTP ports of their own, and each application then waits half a minute
    # before it ends, for load balancers to notice: in front of a Ray that starts here are none.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # cuBLAS is deterministic only with a workspace of its own.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # One actor instead of many reads Parquet footers; several would take the CPUs of a small machine.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
}


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def apply() -> None:
    """Set each of ``SETTINGS`` that the environment does not already have."""
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
