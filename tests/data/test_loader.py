"""Batches: every image at most once, the same whatever the number of workers, cropped and flipped as stated."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raypp.data.loader import Augmentation, DeviceLoader, make_generator, to_float_tensor
from raypp.utils.errors import DataError

NOTHING = Augmentation(0, False)


def noise(num: int, height: int = 5, width: int = 6, channels: int = 3) -> Tensor:
    pixels = np.random.default_rng(num).integers(0, 256, (num, height, width, channels), dtype=np.uint8)
    return torch.from_numpy(pixels)


def loader(
    num: int, batch_size: int, augmentation: Augmentation = NOTHING, seed: int = 0, **where: int
) -> DeviceLoader:
    """Batches of images whose label is their index."""
    return DeviceLoader(
        noise(num), torch.arange(num), batch_size=batch_size, seed=seed, augmentation=augmentation, **where
    )


def seen(batches: DeviceLoader, epoch: int) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches.epoch(epoch)]


@given(num=st.integers(1, 60), batch_size=st.integers(2, 20), epoch=st.integers(0, 50))
def test_an_epoch_is_full_batches_of_different_images(num: int, batch_size: int, epoch: int) -> None:
    batches = loader(num, batch_size)
    epoch_batches = seen(batches, epoch)
    assert len(epoch_batches) == batches.num_batches == max(1, num // batch_size)
    assert all(len(batch) == min(batch_size, num) for batch in epoch_batches)
    flat = [i for batch in epoch_batches for i in batch]
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(num))


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    orders = [seen(loader(40, 8, seed=seed), epoch) for seed in (0, 1) for epoch in range(4)]
    assert len({str(order) for order in orders}) == 8
    assert orders[0] == seen(loader(40, 8), 0)
    dropped = [set(range(43)) - {i for batch in seen(loader(43, 8), epoch) for i in batch} for epoch in range(8)]
    assert all(len(rest) == 3 for rest in dropped)
    assert len(set().union(*dropped)) > 3, "the same images are left out of every epoch"


@given(
    num=st.integers(4, 50),
    world=st.sampled_from([2, 4]),
    share=st.integers(1, 5),
    padding=st.integers(0, 3),
    flip=st.booleans(),
    epoch=st.integers(0, 9),
)
def test_workers_share_the_batches_of_one(
    num: int, world: int, share: int, padding: int, flip: bool, epoch: int
) -> None:
    augmentation = Augmentation(padding, flip)
    whole = loader(num, share * world, augmentation)
    if num < share * world and num % world:
        return  # a set smaller than a batch is cut to a multiple of the workers
    parts = [loader(num, share * world, augmentation, rank=rank, world=world) for rank in range(world)]
    shares = zip(*(part.epoch(epoch) for part in parts), strict=True)
    for (images, labels), workers in zip(whole.epoch(epoch), shares, strict=True):
        assert torch.equal(torch.cat([part_images for part_images, _ in workers]), images)
        assert torch.equal(torch.cat([part_labels for _, part_labels in workers]), labels)


def test_small_sets() -> None:
    assert [len(batch) for batch in seen(loader(3, 128), 0)] == [3]
    parts = [seen(loader(7, 128, rank=rank, world=2), 0) for rank in range(2)]
    assert [[len(batch) for batch in part] for part in parts] == [[3], [3]]
    assert not set(parts[0][0]) & set(parts[1][0])
    with pytest.raises(DataError, match="2 training images cannot be shared among 3 workers"):
        loader(2, 128, rank=0, world=3)


def crop_and_flip(image: np.ndarray, padding: int, dy: int, dx: int, flip: bool) -> np.ndarray:
    """Pixel by pixel: the window at (dy, dx) of the image on a black ground, then mirrored."""
    height, width, channels = image.shape
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row + dy - padding, column + dx - padding
            if 0 <= y < height and 0 <= x < width:
                out[row, width - 1 - column if flip else column] = image[y, x]
    assert out.shape == (height, width, channels)
    return out


@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    channels=st.sampled_from([1, 3]),
    padding=st.integers(0, 8),
    flip=st.booleans(),
    seed=st.integers(0, 100),
)
def test_crop_and_flip(height: int, width: int, channels: int, padding: int, flip: bool, seed: int) -> None:
    images = noise(5, height, width, channels)
    augmentation = Augmentation(padding, flip)
    params = augmentation.sample_params(5, make_generator(seed))
    augmented = augmentation.apply(images, *params)
    assert augmented.dtype == torch.uint8
    dy, dx, flips = (param.tolist() for param in params)
    expected = [crop_and_flip(images[i].numpy(), padding, dy[i], dx[i], flips[i]) for i in range(5)]
    assert np.array_equal(augmented.numpy(), np.stack(expected))


def test_offsets_and_flips_use_their_whole_range_evenly() -> None:
    dy, dx, flips = Augmentation(2, True).sample_params(5000, make_generator(0))
    for offsets in (dy, dx):
        assert np.bincount(offsets.numpy(), minlength=5).min() > 850
        assert offsets.max() == 4
    assert not torch.equal(dy, dx)
    assert 2350 < flips.sum() < 2650
    assert not Augmentation(2, False).sample_params(5000, make_generator(0))[2].any()


def test_images_in_a_batch_are_augmented_independently_in_each_epoch() -> None:
    one = noise(1, 9, 9).expand(30, -1, -1, -1)
    batches = DeviceLoader(
        one, torch.zeros(30, dtype=torch.int64), batch_size=30, seed=0, augmentation=Augmentation(4, True)
    )
    epochs = [next(iter(batches.epoch(epoch)))[0] for epoch in range(3)]
    assert len({image.numpy().tobytes() for image in epochs[0]}) > 20
    assert not any(torch.equal(a, b) for a, b in pairwise(epochs))


def test_without_augmentation_images_arrive_as_they_are() -> None:
    batches = loader(12, 4)
    for images, labels in batches.epoch(0):
        assert torch.equal((images * 255).round().to(torch.uint8), batches.images[labels].permute(0, 3, 1, 2))


def test_as_input_maps_every_level_to_its_share() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    values = to_float_tensor(levels)
    assert values.shape == (1, 1, 16, 16)
    assert values.dtype == torch.float32
    assert values.flatten().tolist() == pytest.approx([level / 255 for level in range(256)])
    assert to_float_tensor(noise(2)).is_contiguous(memory_format=torch.channels_last)


def test_generators_of_neighbouring_numbers_do_not_collide() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    assert len({tuple(torch.rand(2, generator=make_generator(*key)).tolist()) for key in keys}) == len(keys)
