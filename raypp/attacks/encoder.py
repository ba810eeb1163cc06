"""Convolutional encoders of images, and the training that attacks with encoders share."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raypp.attacks.base import Shape, Threat, count_validation_images, protect_in_batches, required, shuffle_indices
from raypp.attacks.standardize import StandardizedLogits
from raypp.attacks.trained import AttackTask, TrainedAttack, TrainedOptions
from raypp.config.schema import LinearWarmupDecay, OptimizationConfig, Optimizer
from raypp.data.loader import Augmentation, inference_batch_size
from raypp.models.perceptual import StateDict
from raypp.models.unet import conv_block
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import all_reduce_sum
from raypp.training.task import Phase, TrainableModule
from raypp.utils.images import to_uint8

PATCH = 2  # side of the patches of pixels that become channels, for speed
LEVELS = 3  # of the network, each with half the side and twice the channels of the one before
GRID = 4  # least side of the last feature map, for images of 32 pixels and more


class Encoder(nn.Module):
    """Maps images N x C x H x W in [0, 1] to vectors N x num_features.

    The input is each value and its logit, standardized at its position, with 2 x 2 pixels as channels. Three levels of
    two convolutions follow, then a linear layer of the features at all positions, after pooling for large images.
    """

    def __init__(self, shape: Shape, num_features: int, width: int) -> None:
        super().__init__()
        channels, height, image_width = shape
        self.standardize = StandardizedLogits(channels, (height, image_width))
        widths = [2 * channels * PATCH**2, *(width * 2**level for level in range(LEVELS))]
        self.levels = nn.ModuleList(
            conv_block(channels_in, channels_out, channels_out, smooth=True)
            for channels_in, channels_out in itertools.pairwise(widths)
        )
        sides = [-(-side // PATCH) // 2 ** (LEVELS - 1) for side in (height, image_width)]
        # No adaptive pooling: its gradient is not deterministic.
        self.pooling = [max(1, side // GRID) for side in sides]
        num_positions = math.prod(side // pooling for side, pooling in zip(sides, self.pooling, strict=True))
        self.linear = nn.Linear(widths[-1] * num_positions, num_features)

    def forward(self, images: Tensor) -> Tensor:
        pad = (0, -images.shape[3] % PATCH, 0, -images.shape[2] % PATCH)
        x = F.pixel_unshuffle(F.pad(self.standardize(images), pad, mode="replicate"), PATCH)
        for level, block in enumerate(self.levels):
            x = block(F.max_pool2d(x, 2) if level else x)
        features: Tensor = self.linear(F.avg_pool2d(x, self.pooling).flatten(1)).float()
        return features


@torch.no_grad()
def encode_in_batches(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the vectors (N, D) of images uint8 (N, C, H, W)."""
    size = inference_batch_size(images.permute(0, 2, 3, 1))
    return torch.cat([encoder(batch.float() / 255) for batch in images.split(size)])


class EncoderOptions(TrainedOptions):
    """Options of attacks that train encoders."""

    width: int = Field(32, ge=1, le=1024)
    """Channels of an encoder's first level."""
    train: OptimizationConfig = OptimizationConfig(
        epochs=20,
        batch_size=256,
        optimizer=Optimizer(name="muon", lr=0.02, momentum=0.9, weight_decay=0.01),
        schedule=LinearWarmupDecay(warmup=0.1, final=0.0),
    )


class EncoderModule(TrainableModule):
    """The networks of an attack with encoders; ``forward(images, indices)`` returns the loss of plain images."""

    @abstractmethod
    def fit_normalization(self, plain: Tensor, protected: Tensor) -> None:
        """Standardize the inputs by some images uint8 (N, C, H, W) and their protected versions."""

    @abstractmethod
    def scores(self, plain: Tensor, protected: Tensor, part: slice) -> dict[str, Tensor]:
        """Return the loss and other scores (n,) of ``part`` of some images and their protected versions, uint8."""


class EncoderTask(AttackTask):
    """Trains encoders on the attacker's images, and validates them on others of them."""

    def __init__(self, attack: EncoderAttack, epochs: int, num_images: int | None) -> None:
        self.attack = attack
        images = required(attack.access.images)
        num_val = count_validation_images(len(images))
        order = shuffle_indices(len(images), attack.seed).to(images.device)
        train, val = order[num_val:][:num_images], images[order[:num_val]]
        self.val = val, attack.protect(val)  # plain and protected
        super().__init__(attack, epochs, images[train], train, self.val[1], attack.augmentation)

    def build(self, phase: Phase) -> EncoderModule:
        torch.manual_seed(self.seed)
        plain, protected = self.val
        module: EncoderModule = self.attack.build_module(protected.shape[1:])
        module.fit_normalization(plain, protected)
        return module

    @torch.inference_mode()
    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        assert isinstance(trainee, EncoderModule)
        scores = trainee.eval().scores(*self.val, slice(rank, None, world))
        num = len(self.val[0][rank::world])  # with few images a worker may have none
        sums = torch.stack([values.double().sum() for values in scores.values()])
        *totals, num_images = all_reduce_sum(torch.cat((sums, sums.new_tensor([num])))).tolist()
        return {f"val_{name}": total / num_images for name, total in zip(scores, totals, strict=True)}


class EncoderAttack(TrainedAttack):
    """Base of the attacks that train encoders with the protection as an oracle."""

    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("protect", "images")
    augmentation: ClassVar[Augmentation] = Augmentation(0, False)
    """Augmentation of training images before they are protected."""
    encoder: ClassVar[str]
    """Name of the encoder of protected images in the module."""

    @abstractmethod
    def build_module(self, protected: tuple[int, ...]) -> Any:
        """Build the :class:`EncoderModule` for protected images of the shape (C', H', W')."""

    @property
    def num_images(self) -> int:
        num = len(required(self.access.images))
        return num - count_validation_images(num)

    def task(self, share_epochs: float = 1.0, num_images: int | None = None) -> EncoderTask:
        return EncoderTask(self, self._num_epochs(share_epochs, num_images), num_images)

    def protect(self, images: Tensor) -> Tensor:
        """Protect images uint8 (N, C, H, W)."""
        return protect_in_batches(required(self.access.protect), images.to(self.access.device))

    def protect_batch(self, images: Tensor) -> Tensor:
        """Protect images in [0, 1] of a training batch; returns values in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return required(self.access.protect)(to_uint8(images)).float() / 255

    def state(self, trainee: TrainableModule) -> StateDict:
        return {key: value.detach().cpu() for key, value in trainee.state_dict().items()}

    def load(self, state: StateDict) -> None:
        _, channels, height, width = state[f"{self.encoder}.standardize.mean"].shape
        self._module = self.build_module((channels // 2, height, width))  # each value and its logit
        self._module.load_state_dict(state)
        self._module.to(self.access.device).eval().requires_grad_(False)
