"""Training of an inverse network as a task for the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raypp.attacks.base import AttackTask, tensor_sha256
from raypp.attacks.inverse_network import InverseModule, InverseNetwork, ProtectedBatches, reconstruction_loss
from raypp.data.loader import Augmentation
from raypp.metrics.image import MIN_SIDE, psnr, ssim
from raypp.metrics.retrieval import reidentify
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import all_reduce_sum
from raypp.training.task import Phase, TrainableModule
from raypp.utils.images import to_uint8

if TYPE_CHECKING:
    from raypp.attacks.inverse import InverseAttack

MAX_PSNR = 60.0  # dB; an exact estimate would make the mean infinite


class InverseTask(AttackTask):
    """Trains an inverse network on the attacker's images and validates it on others of them.

    Args:
        attack: the attack with its options and knowledge.
        epochs: number of epochs.
        source: the protection of training batches.
        images: the attacker's plain images, uint8 (N, C, H, W).
        indices: indices of training and of validation images in ``images``.
        val: plain and protected validation images.
    """

    def __init__(
        self,
        attack: InverseAttack,
        epochs: int,
        source: ProtectedBatches,
        images: Tensor,
        indices: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
    ) -> None:
        options, access = attack.options, attack.access
        self.attack, self.train, self.seed = attack, options.train, attack.seed
        self.phases = [Phase(options.name, epochs)]
        self.source, self.val = source, val
        self.indices, self.val_indices = indices
        self.images = images[self.indices]
        self.labels = access.labels if options.conditional else None
        has_oracle = access.protect is not None or access.fresh is not None
        augment = has_oracle and not options.fixed_pairs
        self.augmentation = Augmentation(options.crop_padding if augment else 0, options.flip and augment)
        # An oracle may use a new key for each image, so its protected images do not identify the data.
        self.fingerprint = tensor_sha256(self.images, *([] if has_oracle else [val[1]]))
        self.share(0, 1)

    def build(self, phase: Phase) -> InverseModule:
        torch.manual_seed(self.seed)
        network = self.attack.network(self.val[1].shape[1:])
        network.fit_normalization(self.val[1].cpu())
        return InverseModule(network, self.source, self.labels, self.attack.options)

    @torch.inference_mode()
    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        assert isinstance(trainee, InverseModule)
        plain = self.val[0]
        names = ["loss", "psnr", "reidentified", *(["ssim"] if min(plain.shape[-2:]) >= MIN_SIDE else [])]
        num = len(plain[rank::world])
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=plain.device)
        if num:  # with few images a worker may have none
            scores = self._scores(trainee.final.eval(), slice(rank, None, world))
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
            "psnr": psnr(estimates, target).clamp_max(MAX_PSNR),
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
