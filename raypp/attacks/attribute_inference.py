"""T4: infer the mean color and a 4 x 4 thumbnail of the plain image.

An encoder is trained to regress the thumbnail from the protected image, by squared error. The share of the variance
that it explains (R2) shows the coarse content that a protected image reveals, even where no picture can be recognized.
Attribute inference as in Song, Shmatikov 2020 (Overlearning reveals sensitive attributes), with colors as attributes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raypp.attacks.base import MAX_VAL
from raypp.attacks.encoder import Encoder, EncoderAttack, EncoderModule, EncoderOptions, encode_in_batches
from raypp.data.loader import Augmentation
from raypp.training.task import StepOutput
from raypp.utils.images import to_uint8

SIDE = 4  # of the thumbnail
MIN_STD = 1 / 255  # of attributes with an R2: one gray level


def thumbnails(images: Tensor) -> Tensor:
    """Return the mean colors of 4 x 4 areas of images (N, C, H, W), as (N, C, 4, 4)."""
    return F.adaptive_avg_pool2d(images, SIDE)


class AttributeModule(EncoderModule):
    """An encoder of protected images, whose vectors are thumbnails."""

    def __init__(self, attack: AttributeInference, protected: tuple[int, ...]) -> None:
        super().__init__()
        self.attack = attack
        channels, height, width = protected
        self.num_channels = attack.access.shape[0]
        self.encoder = Encoder((channels, height, width), self.num_channels * SIDE**2, attack.options.width)

    def fit_normalization(self, plain: Tensor, protected: Tensor) -> None:
        self.encoder.standardize.fit(protected.cpu().float() / 255)
        with torch.no_grad():  # training starts from the mean thumbnail
            self.encoder.linear.bias.copy_(thumbnails(plain.cpu().float() / 255).mean(0).flatten())

    def predict(self, protected: Tensor) -> Tensor:
        """Return thumbnails (N, C, 4, 4) of protected images uint8 (N, C', H', W')."""
        return encode_in_batches(self.encoder, protected).view(-1, self.num_channels, SIDE, SIDE)

    def forward(self, images: Tensor, indices: Tensor) -> StepOutput:
        predicted = self.encoder(self.attack.protect_batch(images))
        return StepOutput(F.mse_loss(predicted, thumbnails(images).flatten(1)), {})

    def scores(self, plain: Tensor, protected: Tensor, part: slice) -> dict[str, Tensor]:
        errors = self.predict(protected[part]) - thumbnails(plain[part].float() / 255)
        return {"loss": errors.square().mean(dim=(1, 2, 3))}


class AttributeInference(EncoderAttack):
    """Returns the inferred thumbnail, enlarged. Its further scores are the shares of explained variance.

    They compare the squared error with that of the mean over the attacked images, summed over colors and areas. A share
    is 0 if the originals' values have a standard deviation below one gray level.
    """

    cost: ClassVar[str] = (
        "Trains one encoder, and for its curve three more. A step protects and encodes each image once."
    )
    extra_scores: ClassVar[dict[str, str]] = {
        "r2_mean_color": "share of the variance of the mean color that is inferred (R2)",
        "r2_thumbnail": "share of the variance of a 4 x 4 thumbnail that is inferred (R2)",
    }
    augmentation: ClassVar[Augmentation] = Augmentation(2, True)
    encoder: ClassVar[str] = "encoder"
    max_validation: ClassVar[int] = MAX_VAL

    class Options(EncoderOptions):
        name: Literal["attribute_inference"] = "attribute_inference"

    def build_module(self, protected: tuple[int, ...]) -> AttributeModule:
        return AttributeModule(self, protected)

    @torch.inference_mode()
    def reconstruct(self, protected: Tensor) -> Tensor:
        predicted = self._module.predict(protected.to(self.access.device))
        return to_uint8(F.interpolate(predicted, size=self.access.shape[1:], mode="bilinear"))

    @torch.inference_mode()
    def measure(self, plain: Tensor, protected: Tensor, truth: Tensor) -> dict[str, Tensor]:
        actual = thumbnails(plain.to(self.access.device).float() / 255)
        predicted = self._module.predict(protected.to(self.access.device))
        colors = (values.mean(dim=(2, 3)) for values in (actual, predicted))
        return {
            "r2_mean_color": _explained(*colors),
            "r2_thumbnail": _explained(actual.flatten(1), predicted.flatten(1)),
        }


def _explained(actual: Tensor, predicted: Tensor) -> Tensor:
    """Return values (n,) whose mean is R2 of predictions (n, D), with the variance summed over D.

    They are 0 where the mean variance is below ``MIN_STD**2``.
    """
    variance = (actual - actual.mean(0)).square().mean()
    if variance < MIN_STD**2:
        return torch.zeros(len(actual), device=actual.device)
    return 1 - (actual - predicted).square().mean(1) / variance
