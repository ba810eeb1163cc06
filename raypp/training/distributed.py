"""Collective operations of the trainer; none of them communicates in a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from raypp.utils.errors import NonRetryableError, RayppError

T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank_zero() -> bool:
    """Whether this process writes the results of all workers."""
    return not is_distributed() or dist.get_rank() == 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all workers, in place."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def run_on_all_ranks(step: Callable[[], T]) -> T:
    """Run ``step`` on every worker; if it fails on one, all of them raise the first worker's error."""
    problem: tuple[str, int] | None = None
    try:
        result = step()
    except RayppError as error:
        problem = str(error), error.exit_code
    if problems := [p for p in all_gather_objects(problem) if p is not None]:
        message, exit_code = problems[0]
        raise NonRetryableError(message, exit_code=exit_code)
    return result


def all_gather_objects(value: T) -> list[T]:
    """Return every worker's value on every worker, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sync_batch_norm_buffers(module: nn.Module) -> None:
    """Average batch-norm running statistics over workers, which train on different shares of each batch."""
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    if not buffers or not is_distributed():
        return
    means = all_reduce_sum(torch.cat([b.flatten() for b in buffers])) / dist.get_world_size()
    for buffer, mean in zip(buffers, means.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization over the batches of all workers, which have equal sizes.

    It works on any device; ``torch.nn.SyncBatchNorm`` needs a GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and is_distributed()):
            return super().forward(x)
        count = x.numel() / x.shape[1] * dist.get_world_size()
        values = x if x.dtype == torch.float64 else x.float()
        dims = [dim for dim in range(x.ndim) if dim != 1]
        moments: Tensor = all_reduce(torch.stack((values.sum(dim=dims), values.square().sum(dim=dims))))
        mean = moments[0] / count
        variance = (moments[1] / count - mean.square()).clamp_min(0)  # rounding can make it negative
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        shape = (1, -1, *(1,) * (x.ndim - 2))
        normalized: Tensor = values * scale.view(shape) + shift.view(shape)
        return normalized.to(x.dtype)


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d):
    """For features N x C or N x C x L."""


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d):
    """For images N x C x H x W."""


SYNC_CLASSES = {nn.BatchNorm1d: SyncBatchNorm1d, nn.BatchNorm2d: SyncBatchNorm2d}


def convert_sync_batchnorm(module: nn.Module) -> None:
    """Convert every batch norm in ``module`` in place; parameters and buffers stay the same."""
    for child in module.modules():
        if (sync_class := SYNC_CLASSES.get(type(child))) is not None:  # type: ignore[arg-type]
            child.__class__ = sync_class
