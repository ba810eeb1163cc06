"""Training of an inverse network as a task for the trainer."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raypp.attacks.inverse_network import InverseModule, InverseNetwork, ProtectedBatches, reconstruction_loss
from raypp.data.loader import Augmentation, BatchLoader, DeviceLoader
from raypp.metrics.image import MIN_SIDE, psnr, ssim
from raypp.metrics.retrieval import reidentify
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import all_reduce_sum
from raypp.training.task import Phase, TrainableModule
from raypp.utils.images import to_uint8

if TYPE_CHECKING:
    from raypp.attacks.inverse import InverseAttack

MAX_PSNR = 60.0  # dB: an exact estimate would make a mean infinite


class InverseTask:
    """An inverse network that trains on the attacker's images and is judged on some that he keeps back."""

    divergence_hint = "learning rate (optimizer.lr)"

    def __init__(
        self,
        attack: InverseAttack,
        epochs: int,
        num_images: int | None,
        source: ProtectedBatches,
        images: Tensor,
        at: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
    ) -> None:
        """``at`` gives the places of training and validation images among ``images``; ``val`` is plain, protected."""
        options, access = attack.options, attack.access
        self.attack, self.train, self.seed = attack, options.train, attack.seed
        self.phases = [Phase(options.name, epochs)]
        self.source, self.val, self.val_at = source, val, at[1]
        chosen = at[0][:num_images]
        self.images = images
        self.labels = access.labels if options.conditional else None
        afresh = not options.fixed_pairs and (access.protect is not None or access.fresh is not None)
        self.augmentation = Augmentation(options.crop_padding if afresh else 0, options.flip and afresh)
        self.chosen = chosen
        digest = hashlib.sha256(images[chosen].cpu().contiguous().numpy().tobytes())
        if access.protect is None and access.fresh is None:  # else it may draw a key for each image
            digest.update(val[1].cpu().contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        self.batches: BatchLoader = self._loader(0, 1)

    def share(self, rank: int, world: int) -> None:
        """Take a worker's share of every batch."""
        self.batches = self._loader(rank, world)

    def _loader(self, rank: int, world: int) -> DeviceLoader:
        return DeviceLoader(
            self.images[self.chosen].permute(0, 2, 3, 1),
            self.chosen,
            batch_size=self.train.batch_size,
            seed=self.seed,
            augmentation=self.augmentation,
            rank=rank,
            world=world,
        )

    def build(self, phase: Phase) -> InverseModule:
        torch.manual_seed(self.seed)
        net = self.attack.network(self.val[1].shape[1:])
        net.fit_normalization(self.val[1].cpu())
        return InverseModule(net, self.source, self.labels, self.attack.options)

    @torch.inference_mode()
    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        assert isinstance(trainee, InverseModule)
        plain, protected = (images[rank::world] for images in self.val)
        at = self.val_at[rank::world]
        names = ["loss", "psnr", "reidentified", *(["ssim"] if min(plain.shape[-2:]) >= MIN_SIDE else [])]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=plain.device)
        if len(plain):  # of few images a worker may have none
            net = trainee.final.eval()
            labels = self.labels[at] if self.labels is not None else None
            estimates = in_batches(net, protected, labels, self.train.eval_batch_size)
            estimates = to_uint8(estimates).float() / 255
            target = plain.float() / 255
            originals = torch.arange(len(self.val[0]), device=plain.device)[rank::world]
            one_class = torch.zeros(len(self.val[0]), dtype=torch.int64, device=plain.device)
            ranks = reidentify(estimates, self.val[0].float() / 255, originals, one_class)
            scores = {
                "loss": reconstruction_loss(estimates, target, self.attack.options).loss.expand(len(plain)),
                "psnr": psnr(estimates, target).clamp_max(MAX_PSNR),
                "reidentified": ranks.top(1),
            }
            if "ssim" in names:
                scores["ssim"] = ssim(estimates, target)
            sums = torch.stack([*(scores[name].double().sum() for name in names), sums.new_tensor(len(plain))])
        *numbers, num = all_reduce_sum(sums).tolist()
        return {f"val_{name}": number / num for name, number in zip(names, numbers, strict=True)}

    def end(self, phase: Phase, trainee: TrainableModule) -> None:
        """One phase is all."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is kept beside the networks."""


def in_batches(net: InverseNetwork, protected: Tensor, labels: Tensor | None, batch: int) -> Tensor:
    """Estimates float (N, C, H, W) of protected images uint8."""
    found = []
    for start in range(0, len(protected), batch):
        part = slice(start, start + batch)
        found.append(net(protected[part].float() / 255, labels[part] if labels is not None else None))
    return torch.cat(found)
