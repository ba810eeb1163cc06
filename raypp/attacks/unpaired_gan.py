"""T1: learn to turn protected images into natural-looking ones, without a single pair.

A generator reads protected images, a discriminator tells what it makes from plain images of the same kind. Two forms:
``dcgan`` after the attack of the paper's own lab (Sirichotedumrong, Kiya 2020, arXiv 2010.06198), ``sia`` after SIA-GAN
(Madono, Tanaka, Onishi, Ogawa 2021), whose critic also asks a classifier that learns from labels. Both networks take
their steps at once here, not by turns, and the classifier of ``sia`` is a ResNet-20 in place of a Shake-PyramidNet.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from raypp.attacks.base import AttackError, Threat, TrainedAttack, TrainedOptions, size_mismatch
from raypp.config.overrides import deep_merge
from raypp.config.schema import Constant, OptimizationConfig, Optimizer
from raypp.data.loader import Augmentation, BatchLoader, DeviceLoader
from raypp.models import ADAPTATIONS, BLOCK
from raypp.models.perceptual import StateDict
from raypp.models.resnet import ResNet20, ResNetOptions
from raypp.models.unet import UNet
from raypp.training.checkpoint import EpochMetrics
from raypp.training.task import Phase, StepOutput, TrainableModule
from raypp.utils import registry
from raypp.utils.images import to_uint8

LEAST_SIDE = 16  # of the discriminators


SIA: dict[str, Any] = {"critic_rate": 4.0, "train": {"epochs": 100, "optimizer": {"lr": 0.0001, "momentum": 0.0}}}


class UnpairedGANOptions(TrainedOptions):
    name: Literal["unpaired_gan"] = "unpaired_gan"
    style: Literal["dcgan", "sia"] = "dcgan"
    generator: Literal["auto", "unet", "pixelwise", "blockwise"] = "auto"
    """``auto`` follows the structure of the protected images, which is public."""
    width: int = Field(32, ge=1, le=512)
    """Channels of a U-Net generator's first level."""
    critic_rate: float = Field(1.0, gt=0)
    """Learning rate of the discriminator over the generator's; SIA-GAN has 4."""
    train: OptimizationConfig = OptimizationConfig(
        epochs=25,
        batch_size=64,
        optimizer=Optimizer(name="adamw", lr=0.0002, momentum=0.5, weight_decay=0.0),
        schedule=Constant(),
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_style(cls, given: Any) -> Any:
        """What is left open of ``sia`` is as in SIA-GAN."""
        if not isinstance(given, dict) or given.get("style") != "sia":
            return given
        train = given.get("train") or {}
        if not isinstance(train, dict):
            return given
        return SIA | given | {"train": deep_merge(SIA["train"], train)}


def _conv(before: int, after: int, size: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """A convolution that begins as DCGAN's do (Radford, Metz, Chintala 2016)."""
    layer = nn.Conv2d(before, after, size, stride, padding)
    nn.init.normal_(layer.weight, 0.0, 0.02)
    return layer


class Generator(nn.Module):
    """Protected images N x C' x H' x W' in [0, 1] to N x C x H x W in [0, 1]."""

    def __init__(
        self, shape: tuple[int, int, int], protected: tuple[int, int, int], structure: str, options: Any
    ) -> None:
        super().__init__()
        self.size, channels, channels_in = shape[1:], shape[0], protected[0]
        self.resized = size_mismatch(protected[1:], self.size)
        norm = nn.utils.parametrizations.spectral_norm
        kind = options.generator
        if kind == "auto":
            side = ADAPTATIONS.get(structure).side if structure in ADAPTATIONS else None
            kind = "unet" if side is None else "pixelwise" if side == 1 else "blockwise"
        if kind == "blockwise" and any(side % BLOCK for side in protected[1:]):
            raise AttackError(
                f"attack unpaired_gan with a blockwise generator needs protected images with sides in multiples of "
                f"{BLOCK}, found {protected[1]} x {protected[2]}"
            )
        self.body: nn.Module
        if options.style == "sia":
            # What undoes the scheme's structure is the network that the classifiers of such images have in front.
            front: Any = nn.Identity()
            inside = channels_in
            if structure in ADAPTATIONS:
                front = ADAPTATIONS.get(structure)(channels_in, protected[1:])
                inside = front.channels_out
            self.body = nn.Sequential(
                front, norm(nn.Conv2d(inside, 64, 3, 1, 1)), *(SpectralBlock(64) for _ in range(3)),
                norm(nn.Conv2d(64, 64, 3, 1, 1)), nn.LeakyReLU(0.1), norm(nn.Conv2d(64, channels, 3, 1, 1)),
            )  # fmt: skip
        elif kind == "pixelwise":
            widths = (channels_in, 64, 128, 256)
            layers = [
                layer
                for before, after in pairwise(widths)
                for layer in (_conv(before, after, 1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
            ]
            self.body = nn.Sequential(*layers, _conv(256, channels, 1))
        elif kind == "blockwise":
            self.body = nn.Sequential(
                _conv(channels_in, 48, BLOCK, BLOCK), nn.BatchNorm2d(48), nn.ReLU(inplace=True),
                _conv(48, 48, 1), nn.BatchNorm2d(48), nn.ReLU(inplace=True), _conv(48, 512, 1),
                nn.PixelShuffle(BLOCK), _conv(512 // BLOCK**2, channels, 1),
            )  # fmt: skip
        else:
            self.body = UNet(channels_in, options.width, 3, channels_out=channels)

    def forward(self, protected: Tensor) -> Tensor:
        height, width = self.size
        made: Tensor = (torch.tanh(self.body(2 * protected - 1).float()) + 1) / 2
        if self.resized:
            made = F.interpolate(made, size=self.size, mode="bilinear", antialias=True)
        return made[:, :, :height, :width]


class SpectralBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.layers = nn.Sequential(
            nn.LeakyReLU(0.1), norm(nn.Conv2d(width, width, 3, 1, 1)),
            nn.LeakyReLU(0.1), norm(nn.Conv2d(width, width, 3, 1, 1)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


class SelfAttention(nn.Module):
    """Zhang, Goodfellow, Metaxas, Odena 2019."""

    def __init__(self, width: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.query, self.key = norm(nn.Conv2d(width, width // 8, 1)), norm(nn.Conv2d(width, width // 8, 1))
        self.value = norm(nn.Conv2d(width, width, 1))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        attention = torch.softmax(query.transpose(1, 2) @ key, dim=2)
        y: Tensor = x + self.gain * (value @ attention.transpose(1, 2)).view_as(x)
        return y


def _discriminator(channels: int, style: str) -> nn.Sequential:
    """Images N x channels x H x W in [-1, 1] to scores N x ...; sides of at least 16."""
    norm = nn.utils.parametrizations.spectral_norm
    if style == "dcgan":
        return nn.Sequential(
            _conv(channels, 64, 4, 2, 1), nn.LeakyReLU(0.2),
            norm(_conv(64, 128, 4, 2, 1)), nn.LeakyReLU(0.2),
            _conv(128, 1, 4), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )  # fmt: skip
    return nn.Sequential(
        norm(nn.Conv2d(channels, 128, 3, 1, 1)), nn.LeakyReLU(0.1),
        norm(nn.Conv2d(128, 256, 4, 2, 1)), nn.LeakyReLU(0.1),
        norm(nn.Conv2d(256, 512, 4, 2, 1)), nn.LeakyReLU(0.1), SelfAttention(512),
        norm(nn.Conv2d(512, 1024, 4, 2, 1)), nn.LeakyReLU(0.1), SelfAttention(1024),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(nn.Linear(1024, 1)),
    )  # fmt: skip


class GANTrainee(TrainableModule):
    """Generator, discriminator and, in SIA-GAN's form, a classifier of plain images."""

    def __init__(self, attack: UnpairedGAN, labels: Tensor, ciphertexts: Tensor, classes: Tensor) -> None:
        super().__init__()
        options, access = attack.options, attack.access
        self.options, self.labels, self.ciphertexts, self.classes = options, labels, ciphertexts, classes
        _, *size = ciphertexts.shape
        self.generator = attack.generator((size[0], size[1], size[2]))
        self.discriminator = _discriminator(access.shape[0], options.style)
        self.classifier = None
        if options.style == "sia" and access.num_classes:
            self.classifier = ResNet20(ResNetOptions(), num_classes=access.num_classes, channels=access.shape[0])

    def groups(self) -> list[dict[str, Any]]:
        critic = {id(p) for p in self.discriminator.parameters()}
        return [
            {"params": [p for p in self.parameters() if id(p) not in critic], "factor": 1.0},
            {"params": list(self.discriminator.parameters()), "factor": self.options.critic_rate},
        ]

    def forward(self, images: Tensor, at: Tensor) -> StepOutput:
        drawn = torch.randint(len(self.ciphertexts), (len(images),)).to(images.device)
        made = self.generator(self.ciphertexts[drawn].float() / 255)
        real = self.discriminator(2 * images - 1).float()
        fake = self.discriminator(2 * made.detach() - 1).float()
        fixed = {name: value.detach() for name, value in self.discriminator.state_dict(keep_vars=True).items()}
        judged = torch.func.functional_call(self.discriminator, fixed, (2 * made - 1,)).float()
        if self.options.style == "dcgan":
            critic = F.softplus(-real).mean() + F.softplus(fake).mean()
            loss = F.softplus(-judged).mean()
        else:
            critic = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            loss = -judged.mean()
        if self.classifier is not None:
            # SIA-GAN's attacker knows the classes of his protected images.
            loss = loss + F.cross_entropy(self.classifier(images).float(), self.labels[at])
            loss = loss + F.cross_entropy(self.classifier(made).float(), self.classes[drawn])
        return StepOutput(loss + critic, {"critic": critic.detach()})


class GANTask:
    """The adversarial game; nothing tells the attacker which epoch is the best, so the last counts."""

    divergence_hint = "learning rate (optimizer.lr)"

    def __init__(self, attack: UnpairedGAN, epochs: int, num_images: int | None) -> None:
        self.attack, self.train, self.seed = attack, attack.options.train, attack.seed
        self.phases = [Phase("unpaired_gan", epochs)]
        self.images, self.labels, self.ciphertexts, self.classes = (part[:num_images] for part in attack.material)
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy().tobytes())
        if attack.access.protect is None:  # else it may draw a key for each image
            digest.update(self.ciphertexts.cpu().contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        self.share(0, 1)

    def share(self, rank: int, world: int) -> None:
        self.batches: BatchLoader = DeviceLoader(
            self.images.permute(0, 2, 3, 1),
            torch.arange(len(self.images), device=self.images.device),
            batch_size=self.train.batch_size,
            seed=self.seed,
            augmentation=Augmentation(0, True),
            rank=rank,
            world=world,
        )

    def build(self, phase: Phase) -> GANTrainee:
        torch.manual_seed(self.seed)
        return GANTrainee(self.attack, self.labels, self.ciphertexts, self.classes)

    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        return {}

    def end(self, phase: Phase, trainee: TrainableModule) -> None:
        """One phase is all."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is kept beside the networks."""


class UnpairedGAN(TrainedAttack):
    """A generator from protected to natural-looking images."""

    Options: ClassVar[type[registry.MethodConfig]] = UnpairedGANOptions
    threat: ClassVar[Threat] = Threat.T1
    needs: ClassVar[tuple[str, ...]] = ("ciphertexts",)

    @cached_property
    def material(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Plain images, their classes, protected images of other originals, and theirs, on the device."""
        assert self.access.ciphertexts is not None
        plain, labels, protected, classes = (part.to(self.access.device) for part in self.access.ciphertexts())
        return plain, labels, protected, classes

    def generator(self, protected: tuple[int, int, int]) -> Generator:
        return Generator(self.access.shape, protected, self.access.structure, self.options)

    def task(self, share_epochs: float = 1.0, num_images: int | None = None) -> GANTask:
        if min(self.access.shape[1:]) < LEAST_SIDE:
            raise AttackError(f"attack unpaired_gan needs images with sides of at least {LEAST_SIDE} pixels")
        epochs = max(1, round(self.epochs * share_epochs))
        if num_images is not None and num_images < self.num_images:
            epochs = max(1, round(epochs * self.num_images / num_images))
        return GANTask(self, epochs, num_images)

    @property
    def num_images(self) -> int:
        return len(self.material[0])

    def state(self, trainee: TrainableModule) -> StateDict:
        assert isinstance(trainee, GANTrainee)
        shape = torch.tensor(trainee.ciphertexts.shape[1:])
        return {"shape": shape} | {k: v.detach().cpu() for k, v in trainee.generator.state_dict().items()}

    def load(self, state: StateDict) -> None:
        channels, height, width = state["shape"].tolist()
        self._net = self.generator((channels, height, width))
        self._net.load_state_dict({k: v for k, v in state.items() if k != "shape"})
        self._net.to(self.access.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def reconstruct(self, protected: Tensor) -> Tensor:
        parts = protected.to(self.access.device).split(self.options.train.eval_batch_size)
        return to_uint8(torch.cat([self._net(part.float() / 255) for part in parts]))
