"""Batches for training: the whole set as uint8 on the device, augmented there by a few tensor operations.

Random numbers are drawn on the CPU for the whole batch of all workers and then sliced, so that neither the device nor
a number of workers that divides the batch changes which images are seen, in which order, or how they are cropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raypp.utils.errors import DataError

PIXELS_AT_A_TIME = 2**21  # of images that networks read without training: 2,048 of 32 x 32, 41 of 224 x 224


class BatchLoader(Protocol):
    """One epoch after another of training batches on one worker."""

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
    """Return how many images uint8 (N, H, W, C) a network may read together without training: ``most``, or fewer where
    they are large. A network's memory grows with the pixels that it reads."""
    height, width = images.shape[1:3]
    return max(1, min(most, PIXELS_AT_A_TIME // max(1, height * width)))


def make_generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by several numbers, such as seed, epoch and step, without collisions between them."""
    # SeedSequence pads with zeros: without their count, (seed, epoch) and (seed, epoch, 0) would be the same.
    seed = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) & (2**63 - 1))


class Augmentation:
    """Random crop after zero padding, and horizontal flip, drawn per image."""

    def __init__(self, crop_padding: int, flip: bool) -> None:
        self.crop_padding = crop_padding
        self.flip = flip

    def draw(self, num: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw vertical and horizontal crop offsets in [0, 2*padding] and flips, each (num,)."""
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
        device, p = images.device, self.crop_padding
        padded = torch.nn.functional.pad(images, (0, 0, p, p, p, p))
        columns = torch.arange(width, device=device).expand(num, -1)
        flips = flips.to(device)[:, None]
        columns = torch.where(flips, width - 1 - columns, columns) + dx.to(device)[:, None]
        rows = torch.arange(height, device=device) + dy.to(device)[:, None]
        index = torch.arange(num, device=device)
        return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


class DeviceLoader:
    """Shuffled, augmented batches of a set that lives on the device.

    Each epoch is one permutation; batches are full and what is left over at its end is dropped (another remainder each
    epoch). A set smaller than a batch makes one batch.

    Args:
        images: uint8 (N, H, W, C) on the device.
        labels: int64 (N,) on the device.
        batch_size: images per step over all workers; where ``world`` does not divide it, the next smaller that it does.
        first: applied to uint8 (n, H, W, C) before they are augmented: a protection that allows that order.

    Raises:
        DataError: there are fewer images than workers.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        rank: int = 0,
        world: int = 1,
        first: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.first = first
        if len(images) < world:
            raise DataError(f"{len(images)} training images cannot be shared among {world} workers")
        self.images, self.labels = images, labels
        self.batch_size = min(batch_size, len(images)) // world * world
        self.num_batches = len(images) // self.batch_size
        self.seed, self.augmentation, self.rank, self.world = seed, augmentation, rank, world

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=make_generator(self.seed, epoch))
        share = self.batch_size // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for step in range(first, self.num_batches):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size][mine].to(self.images.device)
            drawn = self.augmentation.draw(self.batch_size, make_generator(self.seed, epoch, step))
            images = self.images[chosen] if self.first is None else self.first(self.images[chosen])
            images = self.augmentation.apply(images, *(d[mine] for d in drawn))
            yield to_float_tensor(images), self.labels[chosen]
