"""Posterior samples of plain images: a conditional flow-matching model, guided by the protection.

A network learns the velocity of the straight path from noise to a plain image, conditioned on the protected image
(conditional flow matching: Lipman, Chen, Ben-Hamu, Nickel, Le 2023; Liu, Gong, Liu 2023). The attack integrates it
from S noises, which gives S plausible plain images instead of one average. Where the attacker has the protection's
gradients, each step first moves the predicted plain image towards the observed protected one (Plug-and-Play flow
matching: Martin, Gagneux, Hagemann, Steidl 2025), by the misfit of logits as in ``white_box``. The estimate is the
sample with the lowest misfit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import AttackerKnowledge, ImageMap, Threat, required
from raypp.attacks.flow_network import FlowNetwork
from raypp.attacks.inverse import InverseAttack, InverseTask
from raypp.attacks.inverse_network import AveragedModule
from raypp.attacks.misfit import checked_logits, interval_misfit
from raypp.attacks.trained import TrainedOptions
from raypp.config.schema import LinearWarmupDecay, OptimizationConfig, Optimizer
from raypp.models.perceptual import StateDict
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import all_reduce_sum
from raypp.training.optim import autocast
from raypp.training.task import Phase, StepOutput, TrainableModule
from raypp.training.threads import AdaptiveThreads
from raypp.utils.images import to_uint8

LOGIT_EPS = 1e-6  # distance from 0 and 1 at which the logit of an output is clipped


class FlowModule(AveragedModule):
    """A velocity network in training."""

    def forward(self, images: Tensor, indices: Tensor) -> StepOutput:
        times, noise = torch.rand(len(images)).to(images.device), torch.randn(images.shape).to(images.device)
        loss = flow_matching_loss(self.net, images, self.protect(images, indices), times, noise).mean()
        return StepOutput(loss, {})


def flow_matching_loss(network: Any, images: Tensor, protected: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error (N,) of predicted velocities.

    Args:
        images: plain images N x C x H x W in [0, 1].
        protected: their protected versions in [0, 1].
        times: (N,) in [0, 1].
        noise: standard normal, of the shape of ``images``.
    """
    plain, t = 2 * images - 1, times[:, None, None, None]
    velocity = network((1 - t) * noise + t * plain, times, network.inputs(protected))
    errors: Tensor = (velocity - (plain - noise)).square().mean(dim=(1, 2, 3))
    return errors


class FlowTask(InverseTask):
    """Trains a velocity network on the attacker's images and validates it on others of them."""

    def build(self, phase: Phase) -> FlowModule:  # type: ignore[override]
        torch.manual_seed(self.seed)
        network = self.attack.network(self.val[1].shape[1:])
        network.inputs.fit_normalization(self.val[1].cpu())
        return FlowModule(network, self.source, self.attack.options)

    @torch.inference_mode()
    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        assert isinstance(trainee, FlowModule)
        plain, protected = (images[rank::world] for images in self.val)
        generator = torch.Generator().manual_seed(self.seed + rank)  # the same noise in every epoch
        total = torch.zeros(2, dtype=torch.float64, device=plain.device)
        size = self.train.eval_batch_size
        for images, observed in zip(plain.split(size), protected.split(size), strict=True):
            times, noise = torch.rand(len(images), generator=generator), torch.randn(images.shape, generator=generator)
            inputs = images.float() / 255, observed.float() / 255, times.to(plain.device), noise.to(plain.device)
            losses = flow_matching_loss(trainee.final.eval(), *inputs)
            total += torch.stack([losses.double().sum(), total.new_tensor(len(images))])
        loss, num_images = all_reduce_sum(total).tolist()
        return {"val_loss": loss / num_images}


class FlowMatching(InverseAttack):
    """Draws several plain images for a protected one; the estimate is the one with the lowest misfit.

    Without the protection's gradients, or with ``guidance`` 0, it samples unguided, at T4. With nothing but pairs it is
    at T3, and the estimate is the sample nearest to the mean of all samples.
    """

    cost: ClassVar[str] = (
        "Trains a U-Net, and for its curve three more; then `samples` times `steps` passes per image, each with "
        "`guidance_steps` gradients of the protection. The defaults are sized to train up to 40 minutes on two cores "
        "with CIFAR-10 at 16 x 16, without the curve."
    )

    class Options(TrainedOptions):
        name: Literal["flow_matching"] = "flow_matching"
        width: int = Field(32, ge=1, le=1024)
        """Channels of the U-Net's first level."""
        depth: int = Field(2, ge=1, le=6)
        """Number of 2x2 poolings of the U-Net."""
        standardize: bool = True
        """Standardize protected values and their logits at their position, as ``inverse``."""
        places: int = Field(8, ge=0, le=256)
        """Learned input channels that encode positions."""
        fixed_pairs: bool = False
        """Protect the attacker's images once, instead of in every epoch after random crops and flips."""
        crop_padding: int = Field(0, ge=0)
        """Pixels of padding for random crops before protecting; samples would show the padding."""
        flip: bool = True
        """Flip half of the images before protecting."""
        ema: float = Field(0.998, ge=0, lt=1)
        """Decay of the moving average of weights that attacks in the end; 0 for no average."""
        samples: int = Field(8, ge=1)
        """Samples per image; the estimate is the one with the lowest misfit."""
        steps: int = Field(25, ge=1)
        """Steps of the integration from noise to image (Euler)."""
        guidance: float = Field(0.1, ge=0)
        """Root mean square by which a gradient step changes a predicted image in [-1, 1]; 0 for no guidance."""
        guidance_steps: int = Field(8, ge=1)
        """Gradient steps through the protection in each step of the integration."""
        num_images: int = Field(200, ge=1)
        """Most images to attack; each takes samples times steps passes."""
        batch_size: int = Field(100, ge=1)
        """Images that are sampled together."""
        train: OptimizationConfig = OptimizationConfig(
            epochs=20,
            batch_size=128,
            optimizer=Optimizer(name="muon", lr=0.01, momentum=0.95, weight_decay=0.0),
            schedule=LinearWarmupDecay(warmup=0.1, final=0.0),
        )

    threat: ClassVar[Threat] = Threat.T5
    max_validation: ClassVar[int] = 25

    @classmethod
    def used_knowledge(cls, options: Any, access: AttackerKnowledge) -> AttackerKnowledge:
        return access if options.guidance else replace(access, gradients=None, logits=None)

    def network(self, protected: Sequence[int]) -> Any:
        channels, height, width = protected
        return FlowNetwork(self.access.shape, (channels, height, width), self.options)

    def task(self, share_epochs: float = 1.0, num_images: int | None = None) -> FlowTask:
        return FlowTask(self, self._num_epochs(share_epochs, num_images), num_images)

    def load(self, state: StateDict) -> None:
        super().load(state)
        self.max_queries = self.options.num_images

    def prepare(self) -> None:
        guided = "guided by the protection" if self.access.gradients is not None else "without guidance"
        chosen = "lowest misfit" if self.access.protect is not None else "least distance from their mean"
        self.note = f"{self.options.samples} samples {guided}; the one with the {chosen} counts"

    @cached_property
    def _logits(self) -> ImageMap:
        """The protection's logits; those of its outputs where it states none."""
        gradients = required(self.access.gradients)
        return checked_logits(self.access, self.seed) or (lambda images: torch.logit(gradients(images), eps=LOGIT_EPS))

    @torch.no_grad()
    def reconstruct(self, protected: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        batches = protected.to(self.access.device).split(self.options.batch_size)
        self._counter = self.count_steps("sampling", len(batches) * self.options.samples * self.options.steps)
        with AdaptiveThreads(self.access.device.type == "cpu") as threads:
            return torch.cat([self._best_samples(batch, generator, threads) for batch in batches])

    def _best_samples(self, protected: Tensor, generator: torch.Generator, threads: AdaptiveThreads) -> Tensor:
        """The best sample uint8 (n, C, H, W) of each protected image uint8."""
        planes = self._network.inputs(protected.float() / 255)
        samples = []
        for _ in range(self.options.samples):
            noise = torch.randn((len(protected), *self.access.shape), generator=generator).to(protected.device)
            samples.append(self._sample(noise, planes, protected, threads))
        stacked = torch.stack(samples)  # (S, n, C, H, W)
        best = self._misfits(stacked, protected).argmin(0)
        return stacked[best, torch.arange(len(protected), device=best.device)]

    def _misfits(self, samples: Tensor, protected: Tensor) -> Tensor:
        """Misfits (S, n) of the samples: that of the guidance, else the mean squared distance of protected versions.

        Without the protection it is the distance from the mean of the samples.
        """
        if self.access.gradients is not None:
            return torch.stack([interval_misfit(self._logits(sample.float() / 255), protected) for sample in samples])
        if self.access.protect is None:
            means = samples.float().mean(0)
            return torch.stack([(sample.float() - means).square().mean(dim=(1, 2, 3)) for sample in samples])
        observed, protect = protected.float(), required(self.access.protect)
        errors = [(protect(sample).to(observed.device).float() - observed) for sample in samples]
        return torch.stack([error.square().mean(dim=(1, 2, 3)) for error in errors])

    def _sample(self, x: Tensor, planes: Tensor, protected: Tensor, threads: AdaptiveThreads) -> Tensor:
        """Integrate from noise (n, C, H, W) to images uint8."""
        steps = self.options.steps
        for step in range(steps):
            time = step / steps
            with autocast(self.options.train, x.device):
                velocity = self._network(x, torch.full((len(x),), time, device=x.device), planes)
            estimate = x + (1 - time) * velocity
            if self.access.gradients is not None:
                estimate = self._guide(estimate, protected)
            x = x + (estimate - x) / (steps - step)
            threads.update()
            self._counter.advance()
        return to_uint8((x.clamp(-1, 1) + 1) / 2)

    def _guide(self, estimate: Tensor, protected: Tensor) -> Tensor:
        """Move predicted images by gradient steps of decreasing length towards a lower misfit."""
        num = self.options.guidance_steps
        for step in range(num):
            with torch.enable_grad():
                estimate = estimate.detach().requires_grad_()
                images = (estimate + 1) / 2
                clamped = images + (images.clamp(0, 1) - images).detach()  # values outside [0, 1] keep a gradient
                misfit = interval_misfit(self._logits(clamped), protected)
                (gradient,) = torch.autograd.grad(misfit.sum(), estimate)
            rms = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            length = self.options.guidance * (1 - step / num)
            estimate = estimate.detach() - length * gradient / rms.clamp_min(1e-12)
        return estimate
