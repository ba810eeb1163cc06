"""Targets that exist in this process: a user's function or module, with images as arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raypp.attacks.base import AttackerKnowledge, ImageMap, protect_in_batches
from raypp.attacks.statements import logits_of, stated_noise_std
from raypp.attacks.target import KNOWN_PAIRS, Target, check_image_size
from raypp.attacks.user_function import checked_map
from raypp.metrics.statistics import wilson_interval
from raypp.models.layers import logits_in_batches
from raypp.utils.device import default_device
from raypp.utils.errors import ConfigError, DataError
from raypp.utils.images import as_pixels, channels_first, to_uint8

MIN_IMAGES = 20  # in the gallery, and of the attacker
ROUNDING = 1e-3  # by which a module's output may leave [0, 1]


@dataclass(frozen=True)
class ArrayTarget:
    """A protection of this process with the images to attack it on.

    Attributes:
        protection: a function from and to NumPy uint8 (N, H, W, C), or a module from and to float (N, C, H, W) in
            [0, 1]. With ``key_generator`` it takes images and a key. An attribute ``noise_std`` states Gaussian noise,
            in gray levels. A module's method ``logits`` returns its output before the last sigmoid.
        images: the gallery, uint8 (N, H, W, C), with ``labels`` (N,) or None.
        attacker_images: the attacker's images, uint8 (M, H, W, C); None takes half of ``images``.
        classifier: from protected images uint8 (N, H, W, C) to classes (N,), or a module from float to logits.
        key_generator: returns a new key.
        differentiable: ``protection`` is a function on tensors, as a module.
    """

    protection: Any
    images: Any = None
    labels: Any = None
    attacker_images: Any = None
    attacker_labels: Any = None
    classifier: Any = None
    key_generator: Callable[[], Any] | None = None
    differentiable: bool = False
    keys: dict[int | None, Any] = field(default_factory=dict)
    """Keys by the attacker's number; None is the target's."""

    @property
    def name(self) -> str:
        """Name of the function or class, for reports."""
        name = getattr(self.protection, "__qualname__", type(self.protection).__qualname__)
        return str(name).rpartition(".")[2].strip("<>") or "function"

    @property
    def maps_tensors(self) -> bool:
        """Whether the protection maps float tensors (N, C, H, W) rather than NumPy arrays."""
        return self.differentiable or isinstance(self.protection, nn.Module)

    def protect_with(self, number: int | None, device: torch.device) -> ImageMap:
        """The protection under the target's key (None) or a key of the attacker, as a map of uint8 tensors."""
        call = self.protection
        if self.key_generator is not None:
            if number not in self.keys:
                self.keys[number] = self.key_generator()
            key = self.keys[number]

            def call(images: Any, key: Any = key) -> Any:
                return self.protection(images, key)

        if self.maps_tensors:
            kind = "module" if isinstance(self.protection, nn.Module) else "function"
            return _tensor_map(call, f"{kind} {self.name}", device)
        return checked_map(call, self.name, device)


def load_array_target(
    arrays: ArrayTarget, *, num_queries: int, num_images: int | None, seed: int, device: torch.device | None = None
) -> Target:
    """Build the target with its gallery, queries and the attacker's images.

    Raises:
        DataError: images or labels are not of the stated form.
        ConfigError: the protection is not callable, fails or returns something else.
    """
    device = device or default_device()
    if not callable(arrays.protection):
        raise ConfigError(
            f"the target is of type {type(arrays.protection).__name__}; allowed is a bundle, its path, a function or a "
            "torch.nn.Module"
        )
    rng = np.random.default_rng(seed)
    gallery, gallery_labels, images, labels, classes = _split(arrays, rng, num_images)
    check_image_size(gallery.shape[2:])
    if isinstance(arrays.protection, nn.Module):
        arrays.protection.to(device).eval()
    protect = arrays.protect_with(None, device)
    if arrays.differentiable:
        _check_gradients(arrays, protect, gallery[:1].to(device))
    gallery, images = gallery.to(device), images.to(device)
    gallery_labels, labels = gallery_labels.to(device), labels.to(device)
    truth = torch.from_numpy(rng.permutation(len(gallery))[:num_queries]).to(device)
    has_gradients = arrays.maps_tensors and arrays.key_generator is None
    access = AttackerKnowledge(
        shape=(gallery.shape[1], gallery.shape[2], gallery.shape[3]),
        num_classes=max(1, len(classes)),
        fresh=(lambda number: arrays.protect_with(number, device)) if arrays.key_generator is not None else None,
        pairs=(images[:KNOWN_PAIRS], protect(images[:KNOWN_PAIRS])),
        protect=protect,
        noise_std=stated_noise_std(arrays.protection, arrays.name),
        gradients=arrays.protection if has_gradients else None,
        logits=logits_of(arrays.protection) if has_gradients else None,
        gallery=gallery,
        device=device,
    ).with_images(images, labels)
    target = Target(
        arrays.name, arrays.name, access, gallery[truth], protect_in_batches(protect, gallery[truth]),
        gallery_labels[truth], gallery, gallery_labels, truth, classes,
    )  # fmt: skip
    return _with_classifier(target, arrays)


def _with_classifier(target: Target, arrays: ArrayTarget) -> Target:
    """Add the classifier to the attacker's knowledge, and its accuracy on the queries to the metrics."""
    if arrays.classifier is None:
        return target
    classify = _classifier_map(arrays.classifier, target.classes, target.access.device)
    correct = int((classify(target.protected) == target.labels).sum())
    num = len(target.labels)
    test = {
        "num_images": num,
        "accuracy": correct / num,
        "accuracy_interval": wilson_interval(correct, num),
        "chance": int(target.labels.bincount().max()) / num,
    }
    return replace(target, access=replace(target.access, classify=classify), metrics={"test": test})


def _split(
    arrays: ArrayTarget, rng: np.random.Generator, num_images: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Gallery and its labels, the attacker's images and labels, and the class names; images uint8 (N, C, H, W)."""
    gallery = as_pixels(arrays.images, "images")
    has_own = arrays.attacker_images is not None
    own = as_pixels(arrays.attacker_images, "attacker_images") if has_own else gallery[:0]
    if has_own and own.shape[1:] != gallery.shape[1:]:
        raise DataError(f"attacker_images are {own.shape[1:]}, images {gallery.shape[1:]}; allowed is one shape")
    gallery_labels, own_labels, classes = _labels(arrays, len(gallery), len(own))
    if not has_own:
        order = rng.permutation(len(gallery))
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        own, own_labels = gallery[first], gallery_labels[first]
        gallery, gallery_labels = gallery[second], gallery_labels[second]
    if num_images is not None:
        order = rng.permutation(len(own))[:num_images]
        own, own_labels = own[order], own_labels[order]
    if min(len(own), len(gallery)) < MIN_IMAGES:
        raise DataError(
            f"the gallery has {len(gallery)} images and the attacker {len(own)}; allowed are {MIN_IMAGES} or more each"
        )
    return (*_tensors(gallery, gallery_labels), *_tensors(own, own_labels), classes)


def _tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    return channels_first(images), torch.from_numpy(labels)


def _labels(arrays: ArrayTarget, num: int, num_own: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Class indices of the gallery and of the attacker's images, and the class names; zeros without labels."""
    if arrays.labels is None:
        return np.zeros(num, dtype=np.int64), np.zeros(num_own, dtype=np.int64), ()
    if num_own and arrays.attacker_labels is None:
        raise DataError("attacker_labels is missing; attacker_images with labels need their classes too")
    labels = np.asarray(arrays.labels)
    own = np.asarray(arrays.attacker_labels) if arrays.attacker_labels is not None else labels[:0]
    for name, values, length in (("labels", labels, num), ("attacker_labels", own, num_own)):
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise DataError(f"{name} has a value that is not a number; allowed is a class for each image")
        if values.shape != (length,):
            raise DataError(f"{name} has the shape {values.shape}; allowed is ({length},), one for each image")
    classes, indices = np.unique(np.concatenate([labels, own]), return_inverse=True)
    indices = indices.astype(np.int64)
    return indices[:num], indices[num:], tuple(str(name) for name in classes)


def _tensor_map(function: Callable[..., Any], name: str, device: torch.device) -> ImageMap:
    @torch.inference_mode()
    def protect(images: Tensor) -> Tensor:
        try:
            output = function(images.to(device).float() / 255)
        except Exception as error:  # a user's code may raise anything
            message = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"{name} failed: {message}") from error
        _check_output(name, output, len(images))
        return to_uint8(output.clamp(0, 1))

    return protect


def _check_gradients(arrays: ArrayTarget, protect: ImageMap, images: Tensor) -> None:
    """Raise ConfigError unless gradients reach the input of the protection; ``images`` are uint8 (n, C, H, W)."""
    protect(images)  # checks the output
    if arrays.key_generator is not None:
        return
    with torch.enable_grad():
        output = arrays.protection((images.float() / 255).requires_grad_())
    if not output.requires_grad:
        raise ConfigError(
            f"{arrays.name} passes no gradients to its input; leave out differentiable, or use operations of torch"
        )


def _check_output(name: str, output: Any, num: int) -> None:
    """Raise ConfigError unless the output for ``num`` images is float (num, C, H, W) in [0, 1]."""
    problem = ""
    if not (isinstance(output, Tensor) and output.is_floating_point() and output.ndim == 4 and output.numel()):
        shape = f" {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        problem = f"{type(output).__name__}{shape}"
    elif len(output) != num or output.shape[1] not in (1, 3):
        problem = f"{tuple(output.shape)} for {num} images"
    elif not output.isfinite().all():
        problem = "values that are not finite"
    elif not -ROUNDING <= float(output.min()) <= float(output.max()) <= 1 + ROUNDING:
        problem = f"values from {float(output.min()):.4g} to {float(output.max()):.4g}"
    if problem:
        raise ConfigError(f"{name} gave {problem}; it must give float images (N, C, H, W) in [0, 1], 1 or 3 channels")


def _classifier_map(classifier: Any, classes: tuple[str, ...], device: torch.device) -> ImageMap:
    """A map from protected images uint8 (N, C, H, W) to class indices (N,)."""
    if not classes:
        raise DataError("labels is missing; a classifier needs the classes of the images")
    if isinstance(classifier, nn.Module):
        classifier.to(device).eval()
        return lambda protected: logits_in_batches(classifier, protected.to(device)).argmax(1)
    index = {name: i for i, name in enumerate(classes)}

    def by_function(protected: Tensor) -> Tensor:
        answers = np.asarray(classifier(protected.permute(0, 2, 3, 1).cpu().numpy()))
        if answers.shape != (len(protected),):
            raise ConfigError(
                f"the classifier gave {answers.shape} for {len(protected)} images; allowed is one class each"
            )
        return torch.tensor([index.get(str(answer), -1) for answer in answers], device=device)

    return by_function
