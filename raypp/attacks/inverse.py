"""Inverse networks: a U-Net that learns plain images from protected ones.

Three attacks use it. ``itn`` is the paper's ITN-Attack with the recipe of its authors' later code. ``inverse`` is our
strongest recipe. ``inverse_own_keys`` knows only the algorithm and learns from the attacker's own keys. Source of
``itn``: Ito, Kinoshita, Kiya 2020 (arXiv 2008.03143), section III-C, and the code of its journal version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import AttackerKnowledge, AttackError, AttackTask, Threat, TrainedAttack, protect_in_batches
from raypp.attacks.inverse_network import InverseBaseConfig, InverseModule, InverseNetwork, ProtectedBatches
from raypp.attacks.inverse_task import InverseTask, reconstruct_in_batches
from raypp.config.schema import MultiStep, OptimizationConfig, Optimizer
from raypp.models.perceptual import StateDict
from raypp.training.task import TrainableModule
from raypp.utils import registry
from raypp.utils.images import to_uint8

MAX_VAL = 1000  # validation images, which are some of the attacker's own
VALIDATION_KEY = 2**31  # number of the attacker's key for validation; those for training are smaller


class InverseOptions(InverseBaseConfig):
    name: Literal["inverse"] = "inverse"


class InverseAttack(TrainedAttack):
    """Base of the three attacks."""

    needs: ClassVar[tuple[str, ...]] = ("pairs",)
    _cached_pairs: tuple[Tensor, Tensor] | None = None

    def network(self, protected: Sequence[int]) -> InverseNetwork:
        """Build the network for protected images of the shape (C', H', W')."""
        channels, height, width = protected
        num_classes = self.access.num_classes if self.options.conditional else 0
        return InverseNetwork(self.access.shape, (channels, height, width), self.options, num_classes)

    @classmethod
    def lacking(cls, access: AttackerKnowledge) -> list[str]:
        missing = super().lacking(access)
        has_oracle = access.protect is not None and access.images is not None
        return [] if has_oracle and missing == ["pairs"] else missing

    @property
    def num_images(self) -> int:
        num = len(self._training_data()[0])
        return num - _num_val(num)

    def task(self, share_epochs: float = 1.0, num_images: int | None = None) -> AttackTask:
        if self.options.conditional and (self.access.classify is None or not self.access.num_classes):
            raise AttackError(
                f"attack {self.options.name} with conditional = true needs the cloud's classifier, which this "
                "target does not provide"
            )
        images, source, protect_indices = self._training_data()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed)).to(images.device)
        num_val = _num_val(len(images))
        train_indices, val_indices = order[num_val:], order[:num_val]
        epochs = self._num_epochs(share_epochs, num_images)
        val = images[val_indices], protect_indices(val_indices)
        return InverseTask(self, epochs, source, images, (train_indices[:num_images], val_indices), val)

    def _training_data(self) -> tuple[Tensor, ProtectedBatches, Callable[[Tensor], Tensor]]:
        """Return the attacker's plain images, the protection of batches, and that of validation images by index."""
        protect = self.access.protect
        if protect is None or self.options.fixed_pairs:
            plain, protected = self._pairs()
            return plain, lambda _, indices: protected[indices].float() / 255, lambda indices: protected[indices]
        assert self.access.images is not None
        images = self.access.images.to(self.access.device)
        return (
            images,
            lambda plain, _: protect(plain).float() / 255,
            lambda indices: protect_in_batches(protect, images[indices]),
        )

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Return plain images and their protected ones, computed once."""
        if self._cached_pairs is None:
            images, protect, device = self.access.images, self.access.protect, self.access.device
            if protect is None:
                assert self.access.pairs is not None
                self._cached_pairs = self.access.pairs[0].to(device), self.access.pairs[1].to(device)
            else:
                assert images is not None
                self._cached_pairs = images.to(device), protect_in_batches(protect, images.to(device))
        return self._cached_pairs

    def state(self, trainee: TrainableModule) -> StateDict:
        assert isinstance(trainee, InverseModule)
        return {k: v.detach().cpu() for k, v in trainee.final.state_dict().items()}

    def load(self, state: StateDict) -> None:
        self._network = self.network(state["protected"].tolist())
        self._network.load_state_dict(state)
        self._network.to(self.access.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def reconstruct(self, protected: Tensor) -> Tensor:
        protected = protected.to(self.access.device)
        labels = None
        if self.options.conditional:
            assert self.access.classify is not None
            labels = self.access.classify(protected)
        return to_uint8(reconstruct_in_batches(self._network, protected, labels, self.options.train.eval_batch_size))


def _num_val(num: int) -> int:
    return min(MAX_VAL, max(1, num // 10))


class Inverse(InverseAttack):
    """Our strongest recipe: Muon, one cycle, no weight decay, L1 + SSIM, flips and crops, averaged weights."""

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
    """As released: SGD, squared error, fixed pairs flipped together, and the weights of the lowest validation error."""

    Options: ClassVar[type[registry.MethodConfig]] = ITNOptions
    threat: ClassVar[Threat] = Threat.T4


class InverseOwnKeysOptions(InverseBaseConfig):
    name: Literal["inverse_own_keys"] = "inverse_own_keys"
    standardise: bool = False  # a position's mean under one key is useless under another


class InverseOwnKeys(InverseAttack):
    """Learns from images protected under the attacker's own keys, with a new key for every batch."""

    Options: ClassVar[type[registry.MethodConfig]] = InverseOwnKeysOptions
    threat: ClassVar[Threat] = Threat.T2
    needs: ClassVar[tuple[str, ...]] = ("images", "fresh")

    def _training_data(self) -> tuple[Tensor, ProtectedBatches, Callable[[Tensor], Tensor]]:
        assert self.access.images is not None
        assert self.access.fresh is not None
        images, fresh = self.access.images.to(self.access.device), self.access.fresh

        def protect(plain: Tensor, _: Tensor) -> Tensor:
            return fresh(int(torch.randint(VALIDATION_KEY, ())))(plain).float() / 255

        return images, protect, lambda indices: protect_in_batches(fresh(VALIDATION_KEY), images[indices])
