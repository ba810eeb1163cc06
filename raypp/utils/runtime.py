"""Environment variables that torch and Ray read at import, and the cores of this process.

``raypp/__init__.py`` applies them before it imports any other module of raypp. Values that the user set have priority.
"""

from __future__ import annotations

import os

VERBOSE = "RAYPP_VERBOSE"  # environment variable that ``--verbose`` sets: Ray's own log lines appear
SETTINGS = {
    # Under `uv run` Ray would build a second environment per job, with several GB for torch.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Train polls its workers every 2 s by default; at 0.2 s fit() returns 4 to 5 s sooner after the last report.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Workers at nice 15 lose 1.3 to 1.6x of their speed to any other process on a small machine.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # One event loop per replica instead of two; raypp computes in another thread and never blocks it. Single images
    # behind HAProxy gain a third to a half (docs/results/serving.md). The second setting writes log lines at once.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # With the throughput setting, replicas open their own HTTP ports, and each application waits 30 s for load
    # balancers before it ends. A Ray that raypp starts has no load balancer in front.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # Serve ends a proxy that takes longer than 5 s to start, and gives up after the third. On a busy machine of two
    # cores all three took longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # cuBLAS is deterministic only with a fixed workspace.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Several actors that read Parquet footers would occupy the CPUs of a small machine.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
}


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def apply() -> None:
    """Set each of ``SETTINGS`` that the environment lacks."""
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
