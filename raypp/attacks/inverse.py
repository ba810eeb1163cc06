"""Inverse networks: a U-Net that learns plain images from protected ones.

Four attacks use it. ``itn`` is the paper's ITN-Attack with the recipe of its authors' later code. ``inverse`` is our
strongest recipe, and ``inverse_conditional`` also knows the class. ``inverse_own_keys`` knows only the algorithm and
learns from the attacker's own keys. Source of ``itn``: Ito, Kinoshita, Kiya 2020 (arXiv 2008.03143), section III-C,
and the code of its journal version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import (
    MAX_VAL,
    MAX_VAL_GALLERY,
    AttackerKnowledge,
    Threat,
    count_validation_images,
    protect_in_batches,
    required,
    shuffle_indices,
)
from raypp.attacks.inverse_network import (
    AveragedModule,
    InverseBaseConfig,
    InverseModule,
    InverseNetwork,
    ProtectedBatches,
    reconstruction_loss,
)
from raypp.attacks.trained import AttackTask, TrainedAttack
from raypp.config.schema import MultiStep, OptimizationConfig, Optimizer
from raypp.data.loader import Augmentation
from raypp.metrics.image import MIN_SIDE, finite_psnr, ssim
from raypp.metrics.retrieval import reidentify
from raypp.models.perceptual import StateDict
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import all_reduce_sum
from raypp.training.task import Phase, TrainableModule
from raypp.utils.images import to_uint8

VALIDATION_KEY = 2**31  # number of the attacker's key for validation; those for training are smaller

TrainingData = tuple[Tensor, ProtectedBatches, Callable[[Tensor], Tensor]]
"""The attacker's plain images, the protection of batches, and that of validation images by index."""


class InverseTask(AttackTask):
    """Trains an inverse network on the attacker's images and validates it on others of them."""

    def __init__(self, attack: InverseAttack, epochs: int, num_images: int | None) -> None:
        self.attack, options = attack, attack.options
        images, self.source, protect_indices = attack.training_data
        order = shuffle_indices(len(images), attack.seed).to(images.device)
        num_val = count_validation_images(len(images))
        train_indices, self.val_indices = order[num_val:][:num_images], order[:num_val]
        self.val = images[self.val_indices], protect_indices(self.val_indices)  # plain and protected
        self.labels = attack.access.labels if attack.conditional else None
        augment = attack.access.has_oracle and not options.fixed_pairs
        augmentation = Augmentation(options.crop_padding if augment else 0, options.flip and augment)
        super().__init__(attack, epochs, images[train_indices], train_indices, self.val[1], augmentation)

    def build(self, phase: Phase) -> InverseModule:
        torch.manual_seed(self.seed)
        network = self.attack.network(self.val[1].shape[1:])
        network.inputs.fit_normalization(self.val[1].cpu())
        return InverseModule(network, self.source, self.labels, self.attack.options)

    @torch.inference_mode()
    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        assert isinstance(trainee, InverseModule)
        plain = self.val[0]
        names = ["loss", "psnr", "reidentified", *(["ssim"] if min(plain.shape[-2:]) >= MIN_SIDE else [])]
        num = len(plain[rank::world])
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=plain.device)
        if num:  # with few images a worker may have none
            network = trainee.final.eval()
            assert isinstance(network, InverseNetwork)
            scores = self._scores(network, slice(rank, None, world))
            sums = torch.stack([*(scores[name].double().sum() for name in names), sums.new_tensor(num)])
        *totals, num_images = all_reduce_sum(sums).tolist()
        return {f"val_{name}": total / num_images for name, total in zip(names, totals, strict=True)}

    def _scores(self, network: InverseNetwork, part: slice) -> dict[str, Tensor]:
        """Scores (n,) of a part of the validation images."""
        plain, protected = self.val
        labels = self.labels[self.val_indices[part]] if self.labels is not None else None
        estimates = reconstruct_in_batches(network, protected[part], labels, self.train.eval_batch_size)
        estimates = to_uint8(estimates).float() / 255
        target = plain[part].float() / 255
        originals = torch.arange(len(plain), device=plain.device)[part]
        one_class = torch.zeros(len(plain), dtype=torch.int64, device=plain.device)
        scores = {
            "loss": reconstruction_loss(estimates, target, self.attack.options).loss.expand(len(target)),
            "psnr": finite_psnr(estimates, target),
            "reidentified": reidentify(estimates, plain.float() / 255, originals, one_class).top(1),
        }
        if min(plain.shape[-2:]) >= MIN_SIDE:
            scores["ssim"] = ssim(estimates, target)
        return scores


def reconstruct_in_batches(network: InverseNetwork, protected: Tensor, labels: Tensor | None, size: int) -> Tensor:
    """Estimates float (N, C, H, W) of protected images uint8."""
    estimates = []
    for start in range(0, len(protected), size):
        part = slice(start, start + size)
        estimates.append(network(protected[part].float() / 255, labels[part] if labels is not None else None))
    return torch.cat(estimates)


class InverseAttack(TrainedAttack):
    """Base of the attacks that learn from pairs of plain and protected images."""

    needs: ClassVar[tuple[str, ...]] = ("pairs",)
    conditional: ClassVar[bool] = False
    """Whether the class is an input of the network."""
    max_validation: ClassVar[int] = MAX_VAL

    def network(self, protected: Sequence[int]) -> InverseNetwork:
        """Build the network for protected images of the shape (C', H', W')."""
        channels, height, width = protected
        num_classes = self.access.num_classes if self.conditional else 0
        return InverseNetwork(self.access.shape, (channels, height, width), self.options, num_classes)

    @classmethod
    def lacking(cls, access: AttackerKnowledge) -> list[str]:
        missing = super().lacking(access)
        can_protect = access.protect is not None and access.images is not None
        return [need for need in missing if need != "pairs" or not can_protect]

    @property
    def num_images(self) -> int:
        images = self.access.images if self.access.protect is not None else required(self.access.pairs)[0]
        num = len(required(images))
        return num - count_validation_images(num)

    def validation_images(self) -> tuple[Tensor, Tensor]:
        images, _, protect_indices = self.training_data
        order = shuffle_indices(len(images), self.seed).to(images.device)
        num = min(count_validation_images(len(images)), self.max_validation)
        return images[order[:MAX_VAL_GALLERY]], protect_indices(order[:num])

    def task(self, share_epochs: float = 1.0, num_images: int | None = None) -> InverseTask:
        return InverseTask(self, self._num_epochs(share_epochs, num_images), num_images)

    @cached_property
    def training_data(self) -> TrainingData:
        access, protect = self.access, self.access.protect
        if protect is None:
            plain, protected = (images.to(access.device) for images in required(access.pairs))
        else:
            plain = required(access.images).to(access.device)
            if not self.options.fixed_pairs:
                return (
                    plain,
                    lambda images, _: protect(images).float() / 255,
                    lambda indices: protect_in_batches(protect, plain[indices]),
                )
            protected = protect_in_batches(protect, plain)
        return plain, lambda _, indices: protected[indices].float() / 255, lambda indices: protected[indices]

    def state(self, trainee: TrainableModule) -> StateDict:
        assert isinstance(trainee, AveragedModule)
        return {k: v.detach().cpu() for k, v in trainee.final.state_dict().items()}

    def load(self, state: StateDict) -> None:
        self._network = self.network(state["inputs.protected"].tolist())
        self._network.load_state_dict(state)
        self._network.to(self.access.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def reconstruct(self, protected: Tensor) -> Tensor:
        protected = protected.to(self.access.device)
        labels = required(self.access.classify)(protected) if self.conditional else None
        return to_uint8(reconstruct_in_batches(self._network, protected, labels, self.options.train.eval_batch_size))


class Inverse(InverseAttack):
    """An inverse network with our strongest recipe: Muon, one cycle, L1 + SSIM, flips and crops, averaged weights."""

    cost: ClassVar[str] = (
        "Trains a U-Net, and for its curve three more. Suite `small` on CIFAR-10 without the curve: 16 minutes on two "
        "cores."
    )

    class Options(InverseBaseConfig):
        name: Literal["inverse"] = "inverse"

    threat: ClassVar[Threat] = Threat.T4


class InverseConditional(InverseAttack):
    """As ``inverse``, with the class as an input: the true one in training, the cloud's prediction in the attack.

    The cloud knows its own answers, so this is the attack of the classifier's owner.
    """

    cost: ClassVar[str] = "As `inverse`, and one pass of the cloud's classifier over the attacked images."

    class Options(InverseBaseConfig):
        name: Literal["inverse_conditional"] = "inverse_conditional"

    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("pairs", "classify")
    conditional = True


class ITN(InverseAttack):
    """The paper's ITN-Attack, an inverse network with its authors' recipe: SGD, squared error and fixed pairs.

    Plain and protected images are flipped together. The weights of the lowest validation error count.
    """

    cost: ClassVar[str] = (
        "Trains a U-Net, and for its curve three more. Width 16, two epochs of CIFAR-10: 12 minutes on two cores."
    )

    class Options(InverseBaseConfig):
        """The recipe of the authors' later code."""

        name: Literal["itn"] = "itn"
        depth: int = Field(4, ge=1, le=6)
        standardize: bool = False
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

    threat: ClassVar[Threat] = Threat.T4


class InverseOwnKeys(InverseAttack):
    """Learns from images protected under the attacker's own keys, with a new key for every batch."""

    cost: ClassVar[str] = "Trains a U-Net, and for its curve three more; each batch is protected under a new key."

    class Options(InverseBaseConfig):
        name: Literal["inverse_own_keys"] = "inverse_own_keys"
        standardize: bool = False  # a position's mean under one key is useless under another

    threat: ClassVar[Threat] = Threat.T2
    needs: ClassVar[tuple[str, ...]] = ("images", "fresh")

    @cached_property
    def training_data(self) -> TrainingData:
        images, fresh = required(self.access.images).to(self.access.device), required(self.access.fresh)

        def protect(plain: Tensor, _: Tensor) -> Tensor:
            return fresh(int(torch.randint(VALIDATION_KEY, ())))(plain).float() / 255

        return images, protect, lambda indices: protect_in_batches(fresh(VALIDATION_KEY), images[indices])
