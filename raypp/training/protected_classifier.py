"""The networks of a training phase: a protection and a classifier, trained with the paper's loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from raypp.config.schema import Config
from raypp.models import FEATURES
from raypp.models.adaptation import AdaptedClassifier, build_classifier
from raypp.models.perceptual import PlainClassifierFeatures, StateDict
from raypp.protections import PROTECTIONS
from raypp.protections.base import AuxiliaryNetworks, Protection
from raypp.protections.plain import Plain
from raypp.training.losses import classification_loss, feature_distance, transformation_loss
from raypp.training.task import Phase, StepOutput, TrainableModule
from raypp.utils.images import quantize_8bit
from raypp.utils.keys import Key


def phases(config: Config) -> list[Phase]:
    """The phases of a training mode; a plain classifier comes first where a later phase needs it."""
    train = config.train
    plain_features = uses_features(config) and FEATURES.get(config.features.name) is PlainClassifierFeatures
    needs_plain = train.mode == "frozen" or plain_features
    plain = [Phase("plain", train.plain_epochs or train.epochs)] if needs_plain else []
    return [*plain, Phase(train.mode, train.epochs)]


def uses_features(config: Config) -> bool:
    """Whether training compares images in the feature network."""
    kind = PROTECTIONS.get(config.protection.name)
    return config.train.mode != "plain" and bool(kind.uses_features(config.protection, config.train.alpha))


METRICS = ("classification_loss", "feature_distance", "accuracy")


@dataclass
class ProtectionStepOutput(StepOutput):
    """Per-batch results; metrics are :data:`METRICS`."""

    protected: Tensor


class ProtectedClassifier(TrainableModule):
    """Protection, classifier and feature network of one phase.

    Args:
        protection: maps plain to protected images; it trains with the classifier unless it has no parameters.
        classifier: classifies protected images.
        features: phi_k of Eq. 6, or None without a feature distance.
        alpha: weight of the feature distance.
        frozen: keep the classifier's weights fixed, in evaluation mode.
        auxiliary_networks: train with the protection, see ``Protection.build_auxiliary_networks``.
        inputs_are_protected: training images are protected already, so the protection does not train.
    """

    frozen_prefixes = ("features.",)

    def __init__(
        self,
        protection: Protection,
        classifier: nn.Module,
        features: nn.Module | None,
        alpha: float,
        frozen: bool,
        auxiliary_networks: AuxiliaryNetworks | None = None,
        inputs_are_protected: bool = False,
    ) -> None:
        super().__init__()
        self.auxiliary, self.protection, self.classifier, self.features = (
            auxiliary_networks,
            protection,
            classifier,
            features,
        )
        self.alpha, self.frozen, self.inputs_are_protected = alpha, frozen, inputs_are_protected
        if frozen:
            classifier.requires_grad_(False)

    def train(self, mode: bool = True) -> ProtectedClassifier:
        super().train(mode)
        if self.frozen:
            self.classifier.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor, *, round_to_8bit: bool = False) -> ProtectionStepOutput:
        """Compute the loss and metrics of plain images N x C x H x W in [0, 1].

        Args:
            round_to_8bit: round protected images to 8 bits, as in a client's upload.
        """
        protected = images if self.training and self.inputs_are_protected else self.protection(images)
        if round_to_8bit:
            protected = quantize_8bit(protected)
        received = self.protection.transmitted(protected) if self.training else protected
        logits = self.classifier(received).float()
        classification = classification_loss(logits, labels)
        loss, distance = classification, torch.zeros_like(classification)
        if self.features is not None and (self.auxiliary is None or not self.auxiliary.uses_feature_loss):
            with torch.no_grad():
                target = self.features(images)
            distance = feature_distance(self.features(protected), target)
            loss = transformation_loss(classification, distance, self.alpha)
        # Validation leaves it out: an adversary's loss is not comparable between epochs.
        if self.auxiliary is not None and self.training:
            loss = loss + self.auxiliary(images, protected, self.features, labels)
        if isinstance(self.classifier, AdaptedClassifier) and (penalty := self.classifier.penalty()) is not None:
            loss = loss + penalty
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        metrics = dict(zip(METRICS, (classification, distance, accuracy), strict=True))
        return ProtectionStepOutput(loss, metrics, protected)

    def reinitialize(self) -> list[nn.Parameter]:
        return self.auxiliary.reinitialize() if self.auxiliary is not None else []


def build_protected_classifier(
    config: Config,
    phase: Phase,
    num_classes: int,
    image_size: tuple[int, int],
    phi: StateDict | None = None,
    plain: StateDict | None = None,
    key: Key | None = None,
) -> ProtectedClassifier:
    """Build the networks of one phase, freshly initialized from ``config.seed``.

    Args:
        image_size: height and width of the plain images.
        phi: weights of the feature network, where it is not the plain classifier's.
        plain: weights of the classifier from the plain phase.
        key: the key of a keyed protection.
    """
    torch.manual_seed(config.seed)
    channels = config.data.channels
    build = partial(
        build_classifier, config.classifier, num_classes=num_classes, channels=channels, image_size=image_size
    )

    def build_plain() -> nn.Module:
        network = build("none")
        if plain is not None:
            network.load_state_dict(plain)
        return network

    if phase.name == "plain":
        classifier = build(config.adaptation_name if config.train.mode == "plain" else "none")
        return ProtectedClassifier(Plain(Plain.Options(), channels=channels), classifier, None, 0.0, frozen=False)
    protection: Protection = PROTECTIONS.build(config.protection, channels=channels, key=key)
    frozen = phase.name == "frozen"
    classifier = build_plain() if frozen else build(config.adaptation_name)
    features: nn.Module | None = None
    if uses_features(config):
        kind = FEATURES.get(config.features.name)
        features = kind(build_plain() if kind is PlainClassifierFeatures else phi)
    return ProtectedClassifier(
        protection,
        classifier,
        features,
        config.train.alpha,
        frozen,
        protection.build_auxiliary_networks(num_classes, image_size),
        inputs_are_protected=protection.augment == "after",
    )
