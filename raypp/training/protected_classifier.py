"""What one phase of training optimises: a protection and a classifier, with the paper's loss between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raypp.config.schema import Config
from raypp.models import FEATURES
from raypp.models.adaptation import AdaptedClassifier, build_classifier
from raypp.models.perceptual import PlainClassifierFeatures, StateDict
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.protections.plain import Plain, PlainOptions
from raypp.training.losses import classification_loss, feature_distance, transformation_loss
from raypp.training.task import Phase, StepOutput, TrainableModule
from raypp.utils.images import quantize_8bit
from raypp.utils.keys import Key


def phases(config: Config) -> list[Phase]:
    """The phases that a mode consists of: a plain classifier comes first where something is built on it."""
    own = Phase(config.train.mode, config.train.epochs)
    needs_plain = config.train.mode == "frozen" or (
        uses_features(config) and FEATURES.get(config.features.name) is PlainClassifierFeatures
    )
    return [Phase("plain", config.train.plain_epochs or config.train.epochs), own] if needs_plain else [own]


def uses_features(config: Config) -> bool:
    """Whether training compares images in the feature network."""
    kind = PROTECTIONS.get(config.protection.name)
    return config.train.mode != "plain" and bool(kind.uses_features(config.protection, config.train.alpha))


METRICS = ("classification_loss", "feature_distance", "accuracy")


@dataclass
class ProtectionStepOutput(StepOutput):
    """Per-batch results; metrics are :data:`METRICS`."""

    logits: Tensor
    protected: Tensor


class ProtectedClassifier(TrainableModule):
    """Protection, classifier and feature network of one phase.

    Args:
        protection: maps plain to protected images; trained with the classifier unless it has no parameters.
        classifier: reads protected images.
        features: phi_k of Eq. 6, or None where nothing is compared in it.
        alpha: weight of the feature distance.
        frozen: keep the classifier as it is, in evaluation mode.
        companion: trained beside the protection, see ``Protection.companion``.
        protected_already: training images come protected, which only a protection that is not trained allows.
    """

    fixed = ("features.",)

    def __init__(
        self,
        protection: Protection,
        classifier: nn.Module,
        features: nn.Module | None,
        alpha: float,
        frozen: bool,
        companion: nn.Module | None = None,
        protected_already: bool = False,
    ) -> None:
        super().__init__()
        self.companion = companion
        self.protection = protection
        self.classifier = classifier
        self.features = features
        self.alpha = alpha
        self.frozen = frozen
        self.protected_already = protected_already
        if frozen:
            classifier.requires_grad_(False)

    def train(self, mode: bool = True) -> ProtectedClassifier:
        super().train(mode)
        if self.frozen:
            self.classifier.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor, *, round_to_8bit: bool = False) -> ProtectionStepOutput:
        """Return loss terms for plain images N x C x H x W in [0, 1].

        Args:
            round_to_8bit: round protected images as a client's upload is.
        """
        protected = images if self.training and self.protected_already else self.protection(images)
        if round_to_8bit:
            protected = quantize_8bit(protected)
        arrived = self.protection.transmitted(protected) if self.training else protected
        logits = self.classifier(arrived).float()
        classification = classification_loss(logits, labels)
        loss, distance = classification, torch.zeros_like(classification)
        if self.features is not None and not (self.companion is not None and self.companion.takes_features):
            with torch.no_grad():
                target = self.features(images)
            distance = feature_distance(self.features(protected), target)
            loss = transformation_loss(classification, distance, self.alpha)
        # In validation it has no say: a live adversary's loss cannot be compared from epoch to epoch.
        if self.companion is not None and self.training:
            loss = loss + self.companion(images, protected, self.features, labels)
        if isinstance(self.classifier, AdaptedClassifier) and (penalty := self.classifier.penalty()) is not None:
            loss = loss + penalty
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        metrics = dict(zip(METRICS, (classification, distance, accuracy), strict=True))
        return ProtectionStepOutput(loss, metrics, logits, protected)


def build_protected_classifier(
    config: Config,
    phase: Phase,
    num_classes: int,
    image_size: tuple[int, int],
    phi: StateDict | None = None,
    plain: StateDict | None = None,
    key: Key | None = None,
) -> ProtectedClassifier:
    """Build the networks of one phase, freshly initialised from ``config.seed``.

    Args:
        image_size: height and width of the plain images.
        phi: weights of a feature network that has weights of its own.
        plain: weights of the classifier from an earlier plain phase.
        key: the key of a keyed protection.
    """
    torch.manual_seed(config.seed)
    channels = config.data.channels

    def classifier(state: StateDict | None = None, adaptation: str = "none") -> nn.Module:
        net = build_classifier(
            config.classifier, adaptation, num_classes=num_classes, channels=channels, image_size=image_size
        )
        if state is not None:
            net.load_state_dict(state)
        return net

    if phase.name == "plain":
        adaptation = config.adaptation_name if config.train.mode == "plain" else "none"
        psi = classifier(adaptation=adaptation)
        return ProtectedClassifier(Plain(PlainOptions(), channels=channels), psi, None, 0.0, frozen=False)
    protection: Protection = PROTECTIONS.build(config.protection, channels=channels, key=key)
    frozen = phase.name == "frozen"
    psi = classifier(plain) if frozen else classifier(adaptation=config.adaptation_name)
    features: nn.Module | None = None
    if uses_features(config):
        kind = FEATURES.get(config.features.name)
        features = kind(classifier(plain)) if kind is PlainClassifierFeatures else kind(phi)
    return ProtectedClassifier(
        protection,
        psi,
        features,
        config.train.alpha,
        frozen,
        protection.companion(num_classes),
        protected_already=protection.augment == "after",
    )
