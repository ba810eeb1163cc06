"""Inverse networks: a U-Net that learns plain images from protected ones.

Three attacks share it. ``itn`` is the paper's ITN-Attack with the recipe of its authors' later code; ``inverse`` is as
strong as we can make it; ``inverse_own_keys`` knows the algorithm only and learns from keys of its own. Source of the
first: Ito, Kinoshita, Kiya 2020 (arXiv 2008.03143), section III-C, and the code of its journal version.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raypp.attacks.base import Access, AttackError, AttackTask, Threat, TrainedAttack, TrainedOptions, other_size
from raypp.config import MultiStep, OneCycle, Optimisation, Optimizer
from raypp.data.loader import Augmentation, Batches, DeviceLoader
from raypp.metrics import LEAST_SIDE, psnr, reidentify, ssim, ssim_for_loss
from raypp.models.perceptual import StateDict
from raypp.models.unet import UNet
from raypp.training.distributed import total
from raypp.training.reporter import Row
from raypp.training.trainer import Phase, Terms, Trainee
from raypp.utils import registry
from raypp.utils.images import to_uint8

MAX_VAL = 1000  # of the attacker's own images, those that he judges his network by
HALF_STEP = 0.5 / 255  # how near to 0 and 1 a value of 8 bits may lie: their logits are infinite
LEAST_STD = (0.02, 0.2)  # of a value and of its logit: a place that hardly ever changes is not blown up to unit scale
STEPS = "steps"  # how many the average has seen, among a checkpoint's tensors
MOST = 8.0  # standard deviations that a standardised value may be away from its mean
MAX_PSNR = 60.0  # dB: an exact estimate would make a mean infinite
OWN_KEY = 2**31  # the attacker's own key that he judges his network by; others are drawn below it

Source = Callable[[Tensor, Tensor], Tensor]
"""Protected images float (n, C', H', W') of plain ones uint8 (n, C, H, W) and of their places (n,) in the set."""


class InverseNetwork(nn.Module):
    """U-Net from protected images N x C' x H' x W' to estimates of plain ones N x C x H x W, all in [0, 1].

    Protected images that are larger by padding are cut, those of quite another size resized. What the U-Net sees
    besides their values is up to the options: see :class:`BaseOptions`.

    Args:
        shape: (C, H, W) of plain images.
        protected: (C', H', W') of protected ones.
        options: ``width``, ``depth``, ``standardise``, ``places``, ``patch`` and ``smooth``.
        num_classes: with more than none, the network is told each image's class.
    """

    mean: Tensor
    std: Tensor
    protected: Tensor

    def __init__(
        self, shape: tuple[int, int, int], protected: tuple[int, int, int], options: BaseOptions, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.size, self.num_classes, self.patch = shape[1:], num_classes, options.patch
        channels, *size = protected
        self.resized = other_size(size, self.size)
        size = list(self.size) if self.resized else size
        self.register_buffer("protected", torch.tensor(protected))  # so that its weights alone say how it is built
        seen = channels * 2 if options.standardise else channels
        self.standardise = options.standardise
        if self.standardise:
            self.register_buffer("mean", torch.zeros(1, seen, *size))
            self.register_buffer("std", torch.ones(1, seen, *size))
        self.places = nn.Parameter(torch.randn(1, options.places, *size) * 0.1) if options.places else None
        inputs = (seen + options.places + num_classes) * self.patch**2
        outputs = shape[0] * self.patch**2
        self.unet = UNet(inputs, options.width, options.depth, channels_out=outputs, smooth=options.smooth)

    @torch.no_grad()
    def look_at(self, protected: Tensor) -> None:
        """Take mean and spread of every place from protected images uint8 (N, C', H', W')."""
        if self.standardise:
            seen = self._seen(self._fitted(protected.float() / 255))
            least = seen.new_tensor(LEAST_STD).repeat_interleave(seen.shape[1] // 2)[None, :, None, None]
            self.mean.copy_(seen.mean(0, keepdim=True))
            self.std.copy_(seen.std(0, correction=0, keepdim=True).maximum(least))

    def _fitted(self, protected: Tensor) -> Tensor:
        if self.resized:
            return F.interpolate(protected, size=self.size, mode="bilinear", antialias=True)
        return protected

    @staticmethod
    def _seen(values: Tensor) -> Tensor:
        """Values in [0, 1] and their logits: a sigmoid's output near 0 or 1 says most by its last bits."""
        return torch.cat((values, torch.logit(values.clamp(HALF_STEP, 1 - HALF_STEP))), dim=1)

    def forward(self, protected: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self._fitted(protected)
        if self.standardise:
            x = ((self._seen(x) - self.mean) / self.std).clamp(-MOST, MOST)
        parts = [x]
        if self.places is not None:
            parts.append(self.places.expand(len(x), -1, -1, -1))
        if self.num_classes:
            assert labels is not None
            planes = F.one_hot(labels, self.num_classes).to(x.dtype)[:, :, None, None]
            parts.append(planes.expand(-1, -1, *x.shape[2:]))
        x = torch.cat(parts, dim=1)
        pad = (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch)
        x = F.pixel_unshuffle(F.pad(x, pad, mode="replicate") if any(pad) else x, self.patch)
        estimate = torch.sigmoid(F.pixel_shuffle(self.unet(x).float(), self.patch))
        height, width = self.size
        return estimate[:, :, :height, :width]


class InverseTrainee(Trainee):
    """An inverse network and, where wanted, the running average of its weights that is used in the end."""

    def __init__(self, net: InverseNetwork, source: Source, labels: Tensor | None, options: Any) -> None:
        super().__init__()
        self.net, self.source, self.labels, self.options = net, source, labels, options
        self.average = copy.deepcopy(net).requires_grad_(False) if options.ema else None
        self.steps = 0

    @property
    def final(self) -> InverseNetwork:
        """The network that attacks."""
        return self.net if self.average is None else self.average

    def own_state(self) -> StateDict:
        return super().own_state() | {STEPS: torch.tensor(self.steps)}

    def load_own_state(self, state: StateDict) -> None:
        super().load_own_state({key: tensor for key, tensor in state.items() if key != STEPS})
        self.steps = int(state[STEPS])

    def forward(self, images: Tensor, at: Tensor) -> Terms:
        with torch.autocast(images.device.type, enabled=False):
            protected = self.source(to_uint8(images), at)
        if self.options.flip_pairs:  # plain and protected alike, as the released code does
            flipped = (torch.rand(len(images)) < 0.5).to(images.device)[:, None, None, None]
            images = torch.where(flipped, images.flip(3), images)
            protected = torch.where(flipped, protected.flip(3), protected)
        labels = self.labels[at] if self.labels is not None else None
        return likeness(self.net(protected, labels), images, self.options)

    def after_step(self) -> None:
        if self.average is None:
            return
        self.steps += 1
        # At the start, when hardly anything has been averaged, the share of what is new is larger.
        share = 1 - min(self.options.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), share)
            for kept, new in zip(self.average.buffers(), self.net.buffers(), strict=True):
                kept.copy_(new)


def likeness(estimates: Tensor, images: Tensor, options: Any) -> Terms:
    """What attacks that draw minimise, by options ``loss`` and ``ssim_weight``; images N x C x H x W in [0, 1]."""
    error = F.mse_loss(estimates, images)
    metrics = {"psnr": -10 * torch.log10(error.detach().clamp_min(1e-9))}
    loss = error if options.loss == "mse" else F.l1_loss(estimates, images)
    if options.ssim_weight and min(images.shape[-2:]) >= LEAST_SIDE:
        similarity = ssim_for_loss(estimates, images).mean()
        loss = loss + options.ssim_weight * (1 - similarity)
        metrics["ssim"] = similarity.detach()
    return Terms(loss, metrics)


class InverseTask:
    """An inverse network that trains on the attacker's images and is judged on some that he keeps back."""

    remedy = "learning rate (optimizer.lr)"

    def __init__(
        self,
        attack: InverseAttack,
        epochs: int,
        num_images: int | None,
        source: Source,
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
        self.batches: Batches = self._loader(0, 1)

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

    def build(self, phase: Phase) -> InverseTrainee:
        torch.manual_seed(self.seed)
        net = self.attack.network(self.val[1].shape[1:])
        net.look_at(self.val[1].cpu())
        return InverseTrainee(net, self.source, self.labels, self.attack.options)

    @torch.inference_mode()
    def validate(self, trainee: Trainee, rank: int, world: int) -> Row:
        assert isinstance(trainee, InverseTrainee)
        plain, protected = (images[rank::world] for images in self.val)
        at = self.val_at[rank::world]
        names = ["loss", "psnr", "reidentified", *(["ssim"] if min(plain.shape[-2:]) >= LEAST_SIDE else [])]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=plain.device)
        if len(plain):  # of few images a worker may have none
            net = trainee.final.eval()
            labels = self.labels[at] if self.labels is not None else None
            estimates = _batched(net, protected, labels, self.train.eval_batch_size)
            estimates = to_uint8(estimates).float() / 255
            target = plain.float() / 255
            originals = torch.arange(len(self.val[0]), device=plain.device)[rank::world]
            one_class = torch.zeros(len(self.val[0]), dtype=torch.int64, device=plain.device)
            ranks = reidentify(estimates, self.val[0].float() / 255, originals, one_class)
            scores = {
                "loss": likeness(estimates, target, self.attack.options).loss.expand(len(plain)),
                "psnr": psnr(estimates, target).clamp_max(MAX_PSNR),
                "reidentified": ranks.top(1),
            }
            if "ssim" in names:
                scores["ssim"] = ssim(estimates, target)
            sums = torch.stack([*(scores[name].double().sum() for name in names), sums.new_tensor(len(plain))])
        *numbers, num = total(sums).tolist()
        return {f"val_{name}": number / num for name, number in zip(names, numbers, strict=True)}

    def end(self, phase: Phase, trainee: Trainee) -> None:
        """One phase is all."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is kept beside the networks."""


def _batched(net: InverseNetwork, protected: Tensor, labels: Tensor | None, batch: int) -> Tensor:
    """Estimates float (N, C, H, W) of protected images uint8."""
    found = []
    for start in range(0, len(protected), batch):
        part = slice(start, start + batch)
        found.append(net(protected[part].float() / 255, labels[part] if labels is not None else None))
    return torch.cat(found)


class BaseOptions(TrainedOptions):
    """What inverse networks have in common; the defaults are the strong one's."""

    width: int = Field(64, ge=1, le=1024)
    """Channels of the U-Net's first level."""
    depth: int = Field(3, ge=1, le=6)
    """Number of 2x2 poolings of the U-Net."""
    patch: int = Field(1, ge=1, le=16)
    """The U-Net works on patches of so many pixels a side, each a pixel with as many more channels: a fourth of the
    time with 2, for a weaker attack."""
    standardise: bool = True
    """Show the U-Net each protected value and its logit, both with the mean and the spread that they have at their
    place taken off: a protection that draws much the same picture for all images says what differs in small changes."""
    places: int = Field(8, ge=0, le=256)
    """Learned channels that tell the U-Net where it is: a protection need not treat all places alike."""
    smooth: bool = True
    """GELU instead of ReLU."""
    loss: Literal["l1", "mse"] = "l1"
    """Absolute or squared error."""
    ssim_weight: float = Field(0.1, ge=0)
    """What is added: so many times 1 - SSIM. A large weight learns structure first and brightness last."""
    fixed_pairs: bool = False
    """Protect the attacker's images once and for all instead of afresh, cropped and mirrored, in every epoch."""
    crop_padding: int = Field(2, ge=0)
    """Random crops before protecting, after so many pixels of padding."""
    flip: bool = True
    """Mirror half of the images before they are protected."""
    flip_pairs: bool = False
    """Mirror plain and protected image alike, after protecting."""
    ema: float = Field(0.998, ge=0, lt=1)
    """Decay of the running average of weights that attacks in the end; 0 takes the weights themselves."""
    conditional: bool = False
    """Tell the network the class, which the cloud knows: at the attack, the classifier's answer."""
    train: Optimisation = Optimisation(
        epochs=20,
        batch_size=32,
        optimizer=Optimizer(name="muon", lr=0.004, momentum=0.95, weight_decay=0.0),
        schedule=OneCycle(warmup=0.2, final=0.0),
    )


class InverseOptions(BaseOptions):
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
    def lacking(cls, access: Access) -> list[str]:
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

    def _material(self) -> tuple[Tensor, Source, Callable[[Tensor], Tensor]]:
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

    def state(self, trainee: Trainee) -> StateDict:
        assert isinstance(trainee, InverseTrainee)
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
        return to_uint8(_batched(self._net, protected, labels, self.options.train.eval_batch_size))


def _num_val(num: int) -> int:
    return min(MAX_VAL, max(1, num // 10))


def _in_parts(protect: Callable[[Tensor], Tensor], images: Tensor, size: int = 500) -> Tensor:
    return torch.cat([protect(part) for part in images.split(size)])


class Inverse(InverseAttack):
    """As strong as we can make it: Muon, one cycle, no weight decay, L1 + SSIM, flips and crops, averaged weights."""

    Options: ClassVar[type[registry.Options]] = InverseOptions
    threat: ClassVar[Threat] = Threat.T4


class ITNOptions(BaseOptions):
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
    train: Optimisation = Optimisation(
        epochs=200,
        batch_size=128,
        optimizer=Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule=MultiStep(milestones=(60, 120, 160), gamma=0.2),
    )


class ITN(InverseAttack):
    """As released: SGD, squared error, pairs made once and mirrored together, the lowest validation error kept."""

    Options: ClassVar[type[registry.Options]] = ITNOptions
    threat: ClassVar[Threat] = Threat.T4


class InverseOwnKeysOptions(BaseOptions):
    name: Literal["inverse_own_keys"] = "inverse_own_keys"
    standardise: bool = False  # a place's mean under one key says nothing about another


class InverseOwnKeys(InverseAttack):
    """Learns from images protected under the attacker's own keys, a new one for every batch."""

    Options: ClassVar[type[registry.Options]] = InverseOwnKeysOptions
    threat: ClassVar[Threat] = Threat.T2
    needs: ClassVar[tuple[str, ...]] = ("images", "fresh")

    @classmethod
    def lacking(cls, access: Access) -> list[str]:
        return [need for need in cls.needs if getattr(access, need) is None]

    def _material(self) -> tuple[Tensor, Source, Callable[[Tensor], Tensor]]:
        assert self.access.images is not None
        assert self.access.fresh is not None
        images, fresh = self.access.images.to(self.access.device), self.access.fresh

        def protect(plain: Tensor, _: Tensor) -> Tensor:
            return fresh(int(torch.randint(OWN_KEY, ())))(plain).float() / 255

        return images, protect, lambda at: _in_parts(fresh(OWN_KEY), images[at])
