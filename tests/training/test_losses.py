"""Eq. 4 to 6 of the paper, against sums written out in NumPy's float64; who learns and who stays fixed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raypp.metrics.image import ssim, ssim_for_loss
from raypp.models.perceptual import PlainClassifierFeatures, VGG16Features
from raypp.models.resnet import ResNet20, ResNetOptions
from raypp.models.vgg import RELU2_2, VGG16_LAYERS, vgg_features
from raypp.protections.learned import Learned
from raypp.protections.plain import Plain
from raypp.training.losses import classification_loss, feature_distance, transformation_loss
from raypp.training.protected_classifier import ProtectedClassifier
from raypp.utils.images import quantize_8bit


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Eq. 5: minus the logarithm of the true class's softmax, mean over the batch."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        top = max(row)
        shares = [math.exp(value - top) for value in row]
        total -= math.log(shares[label] / sum(shares))
    return total / len(labels)


def distance(protected: np.ndarray, plain: np.ndarray) -> float:
    """Eq. 6: squared norm of the difference over C*H*W, mean over the batch."""
    total = 0.0
    for a, b in zip(protected, plain, strict=True):
        channels, height, width = a.shape
        total += sum((float(x) - float(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)) / (
            channels * height * width
        )
    return total / len(plain)


@given(num=st.integers(1, 6), classes=st.integers(2, 9), scale=st.floats(0, 30), seed=st.integers(0, 1000))
def test_equation_5(num: int, classes: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, scale, (num, classes)), rng.integers(0, classes, num)
    loss = classification_loss(torch.from_numpy(logits), torch.from_numpy(labels))
    assert float(loss) == pytest.approx(cross_entropy(logits, labels), rel=1e-5, abs=1e-5)


@given(shape=st.tuples(*[st.integers(1, 5)] * 4), scale=st.floats(0, 100), seed=st.integers(0, 1000))
def test_equation_6(shape: tuple[int, ...], scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, scale, shape), rng.normal(0, 1, shape)
    loss = feature_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert float(loss) == pytest.approx(distance(a, b), rel=1e-5)


def test_equation_4_pushes_away_from_the_plain_image() -> None:
    assert float(transformation_loss(torch.tensor(2.0), torch.tensor(3.0), 0.5)) == 0.5
    features = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
    transformation_loss(torch.zeros(()), feature_distance(features, torch.zeros(1, 1, 1, 2)), 0.1).backward()
    assert features.grad is not None
    assert (features.grad < 0).all(), "gradient descent must increase the distance"


def test_losses_are_taken_in_float32_under_bfloat16() -> None:
    logits, features = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4, 2, 3, 3, dtype=torch.bfloat16)
    labels = torch.tensor([0, 1, 2, 0])
    loss = classification_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(cross_entropy(logits.double().numpy(), labels.numpy()), rel=1e-5)
    assert feature_distance(features, features * 2).dtype == torch.float32


def vgg() -> VGG16Features:
    layers = vgg_features(VGG16_LAYERS[:RELU2_2], 3, batch_norm=False)
    return VGG16Features({k: 3 * v for k, v in layers.state_dict().items()})  # trained weights are larger than initial


def early_block() -> PlainClassifierFeatures:
    return PlainClassifierFeatures(ResNet20(ResNetOptions(), num_classes=4)).train()


@pytest.mark.parametrize("features", [vgg, early_block])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rounded", [True, False])
def test_system_is_the_papers_objective(features: type[nn.Module], training: bool, rounded: bool) -> None:
    torch.manual_seed(0)
    alpha = 0.37
    protection = Learned(Learned.Options(width=4, depth=2))
    system = ProtectedClassifier(
        protection, ResNet20(ResNetOptions(), num_classes=4), features(), alpha, frozen=False
    ).double()
    system.train(training)
    images, labels = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 0, 1])
    with torch.no_grad():
        terms = system(images, labels, round_to_8bit=rounded)
        protected = protection(images)
        if rounded:
            protected = quantize_8bit(protected)
        assert torch.equal(terms.protected, protected)
        logits = system.classifier(protected).numpy()
        phi_protected, phi_plain = system.features(protected).numpy(), system.features(images).numpy()
    expected = cross_entropy(logits, labels.numpy()), distance(phi_protected, phi_plain)
    assert float(terms.metrics["classification_loss"]) == pytest.approx(expected[0], rel=1e-5)
    assert float(terms.metrics["feature_distance"]) == pytest.approx(expected[1], rel=1e-5)
    assert expected[1] > 0.001
    assert float(terms.loss) == pytest.approx(expected[0] - alpha * expected[1], rel=1e-5)


def test_alpha_zero_and_no_features_leave_the_classification_loss() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([3, 0, 1])
    classifier = ResNet20(ResNetOptions(), num_classes=4)
    zero = ProtectedClassifier(Learned(Learned.Options(width=4, depth=2)), classifier, vgg(), 0.0, frozen=False)(
        images, labels
    )
    assert torch.equal(zero.loss, zero.metrics["classification_loss"])
    assert zero.metrics["feature_distance"] > 0
    plain = ProtectedClassifier(Plain(Plain.Options()), classifier, None, 0.5, frozen=False)(images, labels)
    assert torch.equal(plain.loss, plain.metrics["classification_loss"])
    assert plain.metrics["feature_distance"] == 0
    assert torch.equal(plain.protected, images)


def test_gradients_reach_what_is_trained_and_nothing_else() -> None:
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([3, 0, 1])
    for frozen in (False, True):
        torch.manual_seed(0)
        classifier = ResNet20(ResNetOptions(), num_classes=4)
        system = ProtectedClassifier(
            Learned(Learned.Options(width=4, depth=2)), classifier, early_block(), 0.1, frozen=frozen
        )
        buffers = {k: v.clone() for k, v in system.classifier.named_buffers()}
        system.train()
        system(images, labels).loss.backward()
        assert all(p.grad is not None for p in system.protection.parameters())
        assert all((p.grad is None) == frozen for p in system.classifier.parameters())
        assert system.features is not None
        assert all(p.grad is None for p in system.features.parameters())
        assert system.protection.training
        assert system.classifier.training != frozen
        assert not system.features.training
        same = all(torch.equal(v, buffers[k]) for k, v in system.classifier.named_buffers())
        assert same == frozen


def test_the_distance_moves_the_protection() -> None:
    """With the classification term the same, a larger alpha makes another gradient of the protection."""
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([3, 0, 1])
    gradients = []
    for alpha in (0.0, 10.0):
        torch.manual_seed(0)
        system = ProtectedClassifier(
            Learned(Learned.Options(width=4, depth=2)), early_block().classifier, vgg(), alpha, frozen=True
        )
        before = system(images, labels)
        before.loss.backward()
        gradients.append([p.grad.clone() for p in system.protection.parameters() if p.grad is not None])
        with torch.no_grad():
            for p in system.protection.parameters():
                p -= 0.01 * p.grad / p.grad.norm().clamp_min(1e-9)
            after = system(images, labels)
        assert after.loss < before.loss
        if alpha:
            assert after.metrics["feature_distance"] > before.metrics["feature_distance"]
    assert not any(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a.any())


def test_ssim_as_a_loss_is_not_rounded_away_by_autocast() -> None:
    """In bf16 the variances, small differences of squares, would be nothing but rounding."""
    torch.manual_seed(0)
    images = 0.5 + 0.1 * torch.rand(4, 3, 16, 16)
    near = (images + 0.01 * torch.randn(images.shape)).clamp(0, 1)
    exact = ssim(near, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(ssim_for_loss(near, images), exact, atol=1e-4)
