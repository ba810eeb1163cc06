"""Ray's own log lines: they appear inside a Ray job, and elsewhere with ``--verbose``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raypp.cluster.ray_internals import JOB_DRIVER
from raypp.utils.runtime import VERBOSE

SILENT = "CRITICAL"  # Ray Train logs expected restarts as errors


def in_job() -> bool:
    """Whether this process is the driver of a job that ``ray job submit`` started."""
    return JOB_DRIVER in os.environ


def are_shown() -> bool:
    """Whether this process shows Ray's log lines, its workers' among them."""
    return in_job() or os.environ.get(VERBOSE, "0") not in ("", "0")


def init_options() -> dict[str, Any]:
    """Arguments of ``ray.init`` that show or hide the lines of Ray's processes."""
    shown = are_shown()
    return {"log_to_driver": shown, "logging_level": logging.INFO if shown else logging.ERROR}


def train_level() -> str:
    """Log level of Ray Train's controller and workers; INFO is Ray's default."""
    return "INFO" if are_shown() else SILENT


@contextmanager
def hidden_errors() -> Iterator[None]:
    """Hide what is written to standard error, unless Ray's lines are shown; for the end of a session.

    Ray's C++ code writes errors straight to the file descriptor, such as a line per second and unfinished task once its
    processes have ended. Ray has a level for these lines only together with its log files.
    """
    if are_shown():
        yield
        return
    sys.stderr.flush()
    descriptor = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(descriptor, 2)
        os.close(descriptor)
