"""T1: a GAN that learns from unpaired images to turn protected images into natural-looking ones.

A generator reads protected images; a discriminator distinguishes its outputs from plain images of the same kind.
``dcgan`` follows the attack of the paper's lab (Sirichotedumrong, Kiya 2020, arXiv 2010.06198). ``sia`` follows SIA-GAN
(Madono, Tanaka, Onishi, Ogawa 2021), which adds a classifier. Here both networks step at the same time instead of
alternating, and the classifier of ``sia`` is a ResNet-20 instead of a Shake-PyramidNet.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from raypp.attacks.base import AttackerKnowledge, AttackError, Shape, Threat, required, size_mismatch
from raypp.attacks.trained import AttackTask, TrainedAttack, TrainedOptions
from raypp.config.overrides import deep_merge
from raypp.config.schema import Constant, OptimizationConfig, Optimizer
from raypp.data.loader import Augmentation
from raypp.models import ADAPTATIONS, BLOCK
from raypp.models.layers import Residual
from raypp.models.perceptual import StateDict
from raypp.models.resnet import ResNet20, ResNetOptions
from raypp.models.unet import UNet
from raypp.training.checkpoint import EpochMetrics
from raypp.training.task import Phase, StepOutput, TrainableModule
from raypp.utils.images import to_uint8

MIN_SIDE = 16  # of the discriminators' images

SIA: dict[str, Any] = {"critic_rate": 4.0, "train": {"epochs": 100, "optimizer": {"lr": 0.0001, "momentum": 0.0}}}


def _conv(channels_in: int, channels_out: int, size: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """A convolution with DCGAN's initialization (Radford, Metz, Chintala 2016)."""
    layer = nn.Conv2d(channels_in, channels_out, size, stride, padding)
    nn.init.normal_(layer.weight, 0.0, 0.02)
    return layer


class Generator(nn.Module):
    """Maps protected images N x C' x H' x W' in [0, 1] to N x C x H x W in [0, 1]."""

    def __init__(self, access: AttackerKnowledge, protected: Shape, options: Any) -> None:
        super().__init__()
        self.size, channels, channels_in = access.shape[1:], access.shape[0], protected[0]
        self.resized = size_mismatch(protected[1:], self.size)
        kind = options.generator
        if kind == "auto":
            side = ADAPTATIONS.get(access.structure).side if access.structure in ADAPTATIONS else None
            kind = "unet" if side is None else "pixelwise" if side == 1 else "blockwise"
        if kind == "blockwise" and any(side % BLOCK for side in protected[1:]):
            raise AttackError(
                f"attack unpaired_gan with a blockwise generator needs protected images with sides in multiples of "
                f"{BLOCK}, not {protected[1]} x {protected[2]}"
            )
        self.body: nn.Module
        if options.style == "sia":
            self.body = _sia_generator(protected, channels, access.structure)
        elif kind == "pixelwise":
            self.body = _pixelwise_generator(channels_in, channels)
        elif kind == "blockwise":
            self.body = _blockwise_generator(channels_in, channels)
        else:
            self.body = UNet(channels_in, options.width, 3, channels_out=channels)

    def forward(self, protected: Tensor) -> Tensor:
        height, width = self.size
        images: Tensor = (torch.tanh(self.body(2 * protected - 1).float()) + 1) / 2
        if self.resized:
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        return images[:, :, :height, :width]


def _sia_generator(protected: Shape, channels: int, structure: str) -> nn.Sequential:
    """SIA-GAN's generator behind the adaptation network of the protection's structure."""
    adaptation: Any = nn.Identity()
    channels_in = protected[0]
    if structure in ADAPTATIONS:
        adaptation = ADAPTATIONS.get(structure)(channels_in, protected[1:])
        channels_in = adaptation.channels_out
    return nn.Sequential(
        adaptation, spectral_norm(nn.Conv2d(channels_in, 64, 3, 1, 1)),
        *(
            Residual(
                nn.LeakyReLU(0.1), spectral_norm(nn.Conv2d(64, 64, 3, 1, 1)),
                nn.LeakyReLU(0.1), spectral_norm(nn.Conv2d(64, 64, 3, 1, 1)),
            )
            for _ in range(3)
        ),
        spectral_norm(nn.Conv2d(64, 64, 3, 1, 1)), nn.LeakyReLU(0.1), spectral_norm(nn.Conv2d(64, channels, 3, 1, 1)),
    )  # fmt: skip


def _pixelwise_generator(channels_in: int, channels_out: int) -> nn.Sequential:
    layers = [
        layer
        for before, after in pairwise((channels_in, 64, 128, 256))
        for layer in (_conv(before, after, 1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*layers, _conv(256, channels_out, 1))


def _blockwise_generator(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(channels_in, 48, BLOCK, BLOCK), nn.BatchNorm2d(48), nn.ReLU(inplace=True),
        _conv(48, 48, 1), nn.BatchNorm2d(48), nn.ReLU(inplace=True), _conv(48, 512, 1),
        nn.PixelShuffle(BLOCK), _conv(512 // BLOCK**2, channels_out, 1),
    )  # fmt: skip


class SelfAttention(nn.Module):
    """Self-attention of Zhang, Goodfellow, Metaxas, Odena 2019."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = spectral_norm(nn.Conv2d(width, width // 8, 1))
        self.key = spectral_norm(nn.Conv2d(width, width // 8, 1))
        self.value = spectral_norm(nn.Conv2d(width, width, 1))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        attention = torch.softmax(query.transpose(1, 2) @ key, dim=2)
        y: Tensor = x + self.gain * (value @ attention.transpose(1, 2)).view_as(x)
        return y


def _discriminator(channels: int, style: str) -> nn.Sequential:
    """Maps images N x channels x H x W in [-1, 1], with sides of at least 16, to scores N x 1."""
    if style == "dcgan":
        return nn.Sequential(
            _conv(channels, 64, 4, 2, 1), nn.LeakyReLU(0.2),
            spectral_norm(_conv(64, 128, 4, 2, 1)), nn.LeakyReLU(0.2),
            _conv(128, 1, 4), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )  # fmt: skip
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels, 128, 3, 1, 1)), nn.LeakyReLU(0.1),
        spectral_norm(nn.Conv2d(128, 256, 4, 2, 1)), nn.LeakyReLU(0.1),
        spectral_norm(nn.Conv2d(256, 512, 4, 2, 1)), nn.LeakyReLU(0.1), SelfAttention(512),
        spectral_norm(nn.Conv2d(512, 1024, 4, 2, 1)), nn.LeakyReLU(0.1), SelfAttention(1024),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), spectral_norm(nn.Linear(1024, 1)),
    )  # fmt: skip


class GANModule(TrainableModule):
    """Generator, discriminator and, with style ``sia``, a classifier of plain images."""

    def __init__(self, attack: UnpairedGAN, labels: Tensor, ciphertexts: Tensor, classes: Tensor) -> None:
        super().__init__()
        options, access = attack.options, attack.access
        self.options, self.labels, self.ciphertexts, self.classes = options, labels, ciphertexts, classes
        _, channels, height, width = ciphertexts.shape
        self.generator = Generator(access, (channels, height, width), options)
        self.discriminator = _discriminator(access.shape[0], options.style)
        self.classifier = None
        if options.style == "sia" and access.num_classes:
            self.classifier = ResNet20(ResNetOptions(), num_classes=access.num_classes, channels=access.shape[0])

    def param_groups(self) -> list[dict[str, Any]]:
        critic_ids = {id(p) for p in self.discriminator.parameters()}
        return [
            {"params": [p for p in self.parameters() if id(p) not in critic_ids], "factor": 1.0},
            {"params": list(self.discriminator.parameters()), "factor": self.options.critic_rate},
        ]

    def forward(self, images: Tensor, indices: Tensor) -> StepOutput:
        batch = torch.randint(len(self.ciphertexts), (len(images),)).to(images.device)
        generated = self.generator(self.ciphertexts[batch].float() / 255)
        real_scores = self.discriminator(2 * images - 1).float()
        fake_scores = self.discriminator(2 * generated.detach() - 1).float()
        # The generator's loss must not train the discriminator.
        frozen = {name: value.detach() for name, value in self.discriminator.state_dict(keep_vars=True).items()}
        scores = torch.func.functional_call(self.discriminator, frozen, (2 * generated - 1,)).float()
        if self.options.style == "dcgan":
            critic = F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()
            loss = F.softplus(-scores).mean()
        else:
            critic = F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()
            loss = -scores.mean()
        if self.classifier is not None:
            # SIA-GAN's attacker knows the classes of the protected images.
            loss = loss + F.cross_entropy(self.classifier(images).float(), self.labels[indices])
            loss = loss + F.cross_entropy(self.classifier(generated).float(), self.classes[batch])
        return StepOutput(loss + critic, {"critic": critic.detach()})


class GANTask(AttackTask):
    """Trains a GAN. It has no validation loss, because the attacker has no pairs, so the last epoch counts."""

    def __init__(self, attack: UnpairedGAN, epochs: int, num_images: int | None) -> None:
        self.attack = attack
        images, self.labels, self.ciphertexts, self.classes = (part[:num_images] for part in attack.training_data)
        indices = torch.arange(len(images), device=images.device)
        super().__init__(attack, epochs, images, indices, self.ciphertexts, Augmentation(0, True))

    def build(self, phase: Phase) -> GANModule:
        torch.manual_seed(self.seed)
        return GANModule(self.attack, self.labels, self.ciphertexts, self.classes)

    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        return {}


class UnpairedGAN(TrainedAttack):
    """Generates natural-looking images from protected ones.

    An oracle selects the matcher on images that the GAN saw without their pairs. Without an oracle, the fixed matcher
    makes the re-identification rate a lower bound.
    """

    cost: ClassVar[str] = "Trains a generator and a discriminator on the attacker's images."

    class Options(TrainedOptions):
        name: Literal["unpaired_gan"] = "unpaired_gan"
        style: Literal["dcgan", "sia"] = "dcgan"
        generator: Literal["auto", "unet", "pixelwise", "blockwise"] = "auto"
        """``auto`` selects the generator by the structure of the protected images, which is public."""
        width: int = Field(32, ge=1, le=512)
        """Channels of a U-Net generator's first level."""
        critic_rate: float = Field(1.0, gt=0)
        """Ratio of the discriminator's learning rate to the generator's; SIA-GAN has 4."""
        train: OptimizationConfig = OptimizationConfig(
            epochs=25,
            batch_size=64,
            optimizer=Optimizer(name="adamw", lr=0.0002, momentum=0.5, weight_decay=0.0),
            schedule=Constant(),
        )

        @model_validator(mode="before")
        @classmethod
        def _apply_style_defaults(cls, values: Any) -> Any:
            """With style ``sia``, missing settings have SIA-GAN's values."""
            if not isinstance(values, dict) or values.get("style") != "sia":
                return values
            train = values.get("train") or {}
            if not isinstance(train, dict):
                return values
            return SIA | values | {"train": deep_merge(SIA["train"], train)}

    threat: ClassVar[Threat] = Threat.T1
    needs: ClassVar[tuple[str, ...]] = ("ciphertexts",)

    @cached_property
    def training_data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Plain images and their classes, then protected images of other originals and their classes, on the device."""
        plain, labels, protected, classes = (x.to(self.access.device) for x in required(self.access.ciphertexts)())
        return plain, labels, protected, classes

    def task(self, share_epochs: float = 1.0, num_images: int | None = None) -> GANTask:
        if min(self.access.shape[1:]) < MIN_SIDE:
            raise AttackError(f"attack unpaired_gan needs images with sides of at least {MIN_SIDE} pixels")
        return GANTask(self, self._num_epochs(share_epochs, num_images), num_images)

    @property
    def num_images(self) -> int:
        return len(required(self.access.images)) // 2

    def state(self, trainee: TrainableModule) -> StateDict:
        assert isinstance(trainee, GANModule)
        shape = torch.tensor(trainee.ciphertexts.shape[1:])
        return {"shape": shape} | {k: v.detach().cpu() for k, v in trainee.generator.state_dict().items()}

    def load(self, state: StateDict) -> None:
        channels, height, width = state["shape"].tolist()
        self._network = Generator(self.access, (channels, height, width), self.options)
        self._network.load_state_dict({k: v for k, v in state.items() if k != "shape"})
        self._network.to(self.access.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def reconstruct(self, protected: Tensor) -> Tensor:
        batches = protected.to(self.access.device).split(self.options.train.eval_batch_size)
        return to_uint8(torch.cat([self._network(batch.float() / 255) for batch in batches]))
