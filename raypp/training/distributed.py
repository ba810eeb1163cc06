"""The few collective operations of the loop; all of them do nothing in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total(values: Tensor) -> Tensor:
    """Sum a tensor over all workers, in place."""
    if distributed():
        dist.all_reduce(values)
    return values


def first_error(message: str | None) -> str | None:
    """Return the first worker's message that is not None: all workers stop for the same reason, none waits for ever."""
    if not distributed():
        return message
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return next((m for m in messages if m is not None), None)


def average_batch_statistics(module: nn.Module) -> None:
    """Average batch-norm running statistics over workers, each of which saw its own share of every batch."""
    if not distributed():
        return
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the batch of all workers, on any device (torch's own needs a GPU).

    Expects equal shares on every worker.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and distributed()):
            return super().forward(x)
        count = x.numel() / x.shape[1] * dist.get_world_size()
        wide = x if x.dtype == torch.float64 else x.float()
        sums = torch.stack((wide.sum(dim=(0, 2, 3)), wide.square().sum(dim=(0, 2, 3))))
        moments: Tensor = all_reduce(sums)
        mean = moments[0] / count
        variance = (moments[1] / count - mean.square()).clamp_min(0)  # rounding can carry it below
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        normalised: Tensor = wide * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return normalised.to(x.dtype)


def synchronise_batch_norms(module: nn.Module) -> None:
    """Turn every BatchNorm2d below ``module`` into its synchronised form, in place: same parameters, same buffers."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncBatchNorm2d
