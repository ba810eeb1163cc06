"""Inverse networks: a U-Net that learns plain images from protected ones.

Three attacks share it. ``itn`` is the paper's ITN-Attack with the recipe of its authors' later code; ``inverse`` is as
strong as we can make it; ``inverse_own_keys`` knows the algorithm only and learns from keys of its own. Source of the
first: Ito, Kinoshita, Kiya 2020 (arXiv 2008.03143), section III-C, and the code of its journal version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import AttackerKnowledge, AttackError, AttackTask, Threat, TrainedAttack
from raypp.attacks.inverse_network import InverseBaseConfig, InverseModule, InverseNetwork, ProtectedBatches
from raypp.attacks.inverse_task import InverseTask, in_batches
from raypp.config.schema import MultiStep, OptimizationConfig, Optimizer
from raypp.models.perceptual import StateDict
from raypp.training.task import TrainableModule
from raypp.utils import registry
from raypp.utils.images import to_uint8

MAX_VAL = 1000  # of the attacker's own images, those that he judges his network by
OWN_KEY = 2**31  # the attacker's own key that he judges his network by; others are drawn below it


class InverseOptions(InverseBaseConfig):
    name: Literal["inverse"] = "inverse"


class InverseAttack(TrainedAttack):
    """What the three have in common."""

    _made: tuple[Tensor, Tensor] | None = None

    def network(self, protected: Sequence[int]) -> InverseNetwork:
        """For protected images of the shape (C', H', W')."""
        channels, height, width = protected
        classes = self.access.num_classes if self.options.conditional else 0
        return InverseNetwork(self.access.shape, (channels, height, width), self.options, classes)

    @classmethod
    def lacking(cls, access: AttackerKnowledge) -> list[str]:
        oracle = access.protect is not None and access.images is not None
        return [] if oracle or access.pairs is not None else ["pairs"]

    @property
    def num_images(self) -> int:
        """Images that the network learns from, without those that it is judged by."""
        num = len(self._material()[0])
        return num - _num_val(num)

    def task(self, share_epochs: float = 1.0, num_images: int | None = None) -> AttackTask:
        if self.options.conditional and (self.access.classify is None or not self.access.num_classes):
            raise AttackError(
                f"attack {self.options.name} with conditional = true needs the cloud's classifier, which this victim "
                "does not give"
            )
        images, source, val_protected = self._material()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed)).to(images.device)
        num_val = _num_val(len(images))
        at = order[num_val:], order[:num_val]
        epochs = max(1, round(self.epochs * share_epochs))
        if num_images is not None and num_images < len(at[0]):  # as many steps on fewer images
            epochs = max(1, round(epochs * len(at[0]) / num_images))
        val = images[at[1]], val_protected(at[1])
        return InverseTask(self, epochs, num_images, source, images, at, val)

    def _material(self) -> tuple[Tensor, ProtectedBatches, Callable[[Tensor], Tensor]]:
        """The attacker's plain images, how he protects them, and protected ones for validation by their places."""
        protect = self.access.protect
        if protect is None or self.options.fixed_pairs:
            plain, known = self._pairs()
            return plain, lambda _, at: known[at].float() / 255, lambda at: known[at]
        assert self.access.images is not None
        images = self.access.images.to(self.access.device)
        return images, lambda plain, _: protect(plain).float() / 255, lambda at: _in_parts(protect, images[at])

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Plain images and their protected ones, made once."""
        if self._made is None:
            images, protect, device = self.access.images, self.access.protect, self.access.device
            if protect is None:
                assert self.access.pairs is not None
                self._made = self.access.pairs[0].to(device), self.access.pairs[1].to(device)
            else:
                assert images is not None
                self._made = images.to(device), _in_parts(protect, images.to(device))
        return self._made

    def state(self, trainee: TrainableModule) -> StateDict:
        assert isinstance(trainee, InverseModule)
        return {k: v.detach().cpu() for k, v in trainee.final.state_dict().items()}

    def load(self, state: StateDict) -> None:
        self._net = self.network(state["protected"].tolist())
        self._net.load_state_dict(state)
        self._net.to(self.access.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def reconstruct(self, protected: Tensor) -> Tensor:
        protected = protected.to(self.access.device)
        labels = None
        if self.options.conditional:
            assert self.access.classify is not None
            labels = self.access.classify(protected)
        return to_uint8(in_batches(self._net, protected, labels, self.options.train.eval_batch_size))


def _num_val(num: int) -> int:
    return min(MAX_VAL, max(1, num // 10))


def _in_parts(protect: Callable[[Tensor], Tensor], images: Tensor, size: int = 500) -> Tensor:
    return torch.cat([protect(part) for part in images.split(size)])


class Inverse(InverseAttack):
    """As strong as we can make it: Muon, one cycle, no weight decay, L1 + SSIM, flips and crops, averaged weights."""

    Options: ClassVar[type[registry.MethodConfig]] = InverseOptions
    threat: ClassVar[Threat] = Threat.T4


class ITNOptions(InverseBaseConfig):
    """The recipe of the authors' later code."""

    name: Literal["itn"] = "itn"
    depth: int = Field(4, ge=1, le=6)
    standardise: bool = False
    places: int = Field(0, ge=0, le=256)
    smooth: bool = False
    loss: Literal["l1", "mse"] = "mse"
    ssim_weight: float = Field(0.0, ge=0)
    fixed_pairs: bool = True
    flip_pairs: bool = True
    ema: float = Field(0.0, ge=0, lt=1)
    train: OptimizationConfig = OptimizationConfig(
        epochs=200,
        batch_size=128,
        optimizer=Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule=MultiStep(milestones=(60, 120, 160), gamma=0.2),
    )


class ITN(InverseAttack):
    """As released: SGD, squared error, pairs made once and mirrored together, the lowest validation error kept."""

    Options: ClassVar[type[registry.MethodConfig]] = ITNOptions
    threat: ClassVar[Threat] = Threat.T4


class InverseOwnKeysOptions(InverseBaseConfig):
    name: Literal["inverse_own_keys"] = "inverse_own_keys"
    standardise: bool = False  # a place's mean under one key says nothing about another


class InverseOwnKeys(InverseAttack):
    """Learns from images protected under the attacker's own keys, a new one for every batch."""

    Options: ClassVar[type[registry.MethodConfig]] = InverseOwnKeysOptions
    threat: ClassVar[Threat] = Threat.T2
    needs: ClassVar[tuple[str, ...]] = ("images", "fresh")

    @classmethod
    def lacking(cls, access: AttackerKnowledge) -> list[str]:
        return [need for need in cls.needs if getattr(access, need) is None]

    def _material(self) -> tuple[Tensor, ProtectedBatches, Callable[[Tensor], Tensor]]:
        assert self.access.images is not None
        assert self.access.fresh is not None
        images, fresh = self.access.images.to(self.access.device), self.access.fresh

        def protect(plain: Tensor, _: Tensor) -> Tensor:
            return fresh(int(torch.randint(OWN_KEY, ())))(plain).float() / 255

        return images, protect, lambda at: _in_parts(fresh(OWN_KEY), images[at])
