"""The device of this process: the only place that decides between a GPU and the CPU."""

from __future__ import annotations

import sys
from typing import Any

import torch


def default_device(gpu: bool | None = None) -> torch.device:
    """``cuda`` if this process may use a GPU, else ``cpu``.

    A worker of Ray (task, actor, trial, Serve replica) sees all GPUs of its node, and may use one only if Ray has
    assigned it.

    Args:
        gpu: the setting ``cluster.gpu``; False takes the CPU everywhere.
    """
    return torch.device("cuda" if gpu is not False and num_gpus() > 0 else "cpu")


def num_gpus() -> int:
    """Number of GPUs that this process may use."""
    if not torch.cuda.is_available():
        return 0
    assigned = _assigned_gpus()
    return torch.cuda.device_count() if assigned is None else len(assigned)


def _assigned_gpus() -> list[str] | None:
    """GPUs that Ray has assigned to this process; None outside of Ray's workers."""
    ray: Any = sys.modules.get("ray")  # most processes run without Ray, so this module does not import it
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:  # a driver
        return None
    assigned: list[str] = context.get_accelerator_ids().get("GPU", [])
    return assigned
