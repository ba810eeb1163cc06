"""Training batches from a set that is on the device as uint8 and is augmented there.

The CPU draws random numbers for the whole batch of all workers, and each worker takes its slice. Images, order and
crops therefore do not depend on the device, nor on a number of workers that divides the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raypp.utils.errors import DataError

PIXELS_AT_A_TIME = 2**21  # of an inference batch: 2,048 images of 32 x 32, 41 of 224 x 224


class BatchLoader(Protocol):
    """Interface of the training batches of one worker."""

    num_batches: int

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (n, C, H, W) float32 in [0, 1] and labels (n,) on the device, from batch ``first`` on."""


def to_device(images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Move uint8 images (N, H, W, C) and labels to the device, unchanged."""
    return torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)


def to_float_tensor(images: Tensor) -> Tensor:
    """uint8 (N, H, W, C) to float32 (N, C, H, W) in [0, 1]; the result is channels-last in memory."""
    return images.permute(0, 3, 1, 2).float() / 255


def inference_batch_size(images: Tensor, most: int = 500) -> int:
    """Return the batch size for inference on uint8 (N, H, W, C): at most ``most``, and fewer if images are large.

    A network's memory grows with the number of pixels.
    """
    height, width = images.shape[1:3]
    return max(1, min(most, PIXELS_AT_A_TIME // max(1, height * width)))


def make_generator(*seeds: int) -> torch.Generator:
    """A CPU generator seeded by several numbers, such as seed, epoch and step, without collisions between them."""
    # SeedSequence pads with zeros: without the count, (seed, epoch) and (seed, epoch, 0) would be the same.
    seed = np.random.SeedSequence((len(seeds), *seeds)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) & (2**63 - 1))


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding, and random horizontal flip, of each image."""

    crop_padding: int
    flip: bool

    def sample_params(self, num: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Sample vertical and horizontal crop offsets in [0, 2*padding] and flips, each (num,)."""
        span = 2 * self.crop_padding + 1
        dy = torch.randint(0, span, (num,), generator=random)
        dx = torch.randint(0, span, (num,), generator=random)
        flips = torch.rand(num, generator=random) < (0.5 if self.flip else 0.0)
        return dy, dx, flips

    def apply(self, images: Tensor, dy: Tensor, dx: Tensor, flips: Tensor) -> Tensor:
        """Crop and flip uint8 images (n, H, W, C) on their device."""
        if not self.crop_padding and not self.flip:
            return images
        num, height, width, _ = images.shape
        device, padding = images.device, self.crop_padding
        padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
        columns = torch.arange(width, device=device).expand(num, -1)
        flips = flips.to(device)[:, None]
        columns = torch.where(flips, width - 1 - columns, columns) + dx.to(device)[:, None]
        rows = torch.arange(height, device=device) + dy.to(device)[:, None]
        index = torch.arange(num, device=device)
        return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


@dataclass(eq=False)
class DeviceLoader:
    """Shuffled, augmented batches of a set on the device.

    Each epoch is one permutation. All batches are full, and each epoch drops another remainder. A set smaller than a
    batch makes one batch.

    Args:
        images: uint8 (N, H, W, C) on the device.
        labels: int64 (N,) on the device.
        batch_size: images per step over all workers, rounded down to a multiple of ``world``.
        first: applied to uint8 (n, H, W, C) before augmentation: a protection that allows this order.

    Raises:
        DataError: there are fewer images than workers.
    """

    images: Tensor
    labels: Tensor
    _: KW_ONLY
    batch_size: int
    seed: int
    augmentation: Augmentation
    rank: int = 0
    world: int = 1
    first: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        num = len(self.images)
        if num < self.world:
            raise DataError(f"{num} training images cannot be shared among {self.world} workers")
        self.batch_size = min(self.batch_size, num) // self.world * self.world
        self.num_batches = num // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=make_generator(self.seed, epoch))
        num_per_worker = self.batch_size // self.world
        slice_of_rank = slice(self.rank * num_per_worker, (self.rank + 1) * num_per_worker)
        for step in range(first, self.num_batches):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            indices = batch[slice_of_rank].to(self.images.device)
            params = self.augmentation.sample_params(self.batch_size, make_generator(self.seed, epoch, step))
            images = self.images[indices] if self.first is None else self.first(self.images[indices])
            images = self.augmentation.apply(images, *(param[slice_of_rank] for param in params))
            yield to_float_tensor(images), self.labels[indices]
