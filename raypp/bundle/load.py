"""Load the public or the private part of a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from raypp.bundle.guard import PlainImageDetector, restore_detector
from raypp.bundle.manifest import PRIVATE, PUBLIC, local_folder, read_json_file, verify
from raypp.config.presets import read_yaml
from raypp.models import CLASSIFIERS
from raypp.models.adaptation import build_classifier
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.utils.errors import BundleError, ConfigError, first_line
from raypp.utils.keys import FILE, Key

MIN_AGREEMENT = 0.9  # on the self-test samples; processors differ in rounding near decision boundaries


@dataclass(frozen=True)
class PublicBundle:
    """The part for clients: the protection in evaluation mode, with its key if it has one, and its image format."""

    protection: Protection
    channels: int
    image_size: tuple[int, int]
    """Height and width of the images it was trained on."""
    about: dict[str, Any]


@dataclass(frozen=True)
class PrivateBundle:
    """The owner's part: classifier, classes, configuration and measured numbers."""

    classifier: nn.Module
    classes: tuple[str, ...]
    config: dict[str, Any]
    metrics: dict[str, Any]
    guard: PlainImageDetector | None
    sample: Tensor
    """Protected test images uint8 (n, C, H, W)."""
    sample_classes: Tensor
    """The classifier's predictions for ``sample`` at export, int64 (n,)."""

    @torch.inference_mode()
    def problem(self) -> str | None:
        """Why the classifier no longer gives the predictions recorded at export, or None if it does."""
        device = next(self.classifier.parameters()).device
        logits = self.classifier(self.sample.to(device).float() / 255)
        if not bool(torch.isfinite(logits).all()):
            return "its answers are not finite numbers"
        agree = int((logits.argmax(1) == self.sample_classes.to(device)).sum())
        if agree < MIN_AGREEMENT * len(self.sample_classes):
            return f"it gives the recorded answer for {agree} of {len(self.sample_classes)} images of its sample"
        return None


def load_public(location: str | Path, key: Key | None = None) -> PublicBundle:
    """Load and verify the public part of a bundle, from the bundle or its ``public`` folder (path or URI).

    Args:
        key: the key of a keyed protection; a whole bundle holds it in its private part.

    Raises:
        BundleError: the bundle is missing, altered or incomplete, or ``key`` is missing, wrong or not needed.
        ConfigError: the private part's key file is damaged.
    """
    with local_folder(location, "public") as (folder, is_whole):
        is_key_given = key is not None
        key_file = folder.parent / "private" / FILE
        if key is None and is_whole and key_file.is_file():
            key = Key.read(key_file)
        verify(folder, *PUBLIC)
        info = read_json_file(folder / "protection.json")
        with _build_errors("protection", location):
            options = PROTECTIONS.options(info["protection"]["name"]).model_validate(info["protection"])
            if PROTECTIONS.get(options.name).needs_key(options):
                _check_key(key, info["key"], location)
            elif is_key_given:
                raise BundleError(f"the protection {options.name!r} in {str(location)!r} has no key; leave it out")
            protection: Protection = PROTECTIONS.build(options, channels=info["channels"], key=key)
            protection.load_state_dict(load((folder / "protection.safetensors").read_bytes()))
            height, width = (int(side) for side in info["image_size"])
            if min(height, width) < 1 or info["channels"] not in (1, 3):
                raise ValueError(f"it reads no images of {height} x {width} with {info['channels']} channels")
    protection.eval().requires_grad_(False)
    return PublicBundle(protection, info["channels"], (height, width), info)


def load_private(location: str | Path) -> PrivateBundle:
    """Load and verify the private part of a bundle, from the bundle or its ``private`` folder (path or URI)."""
    with local_folder(location, "private") as (folder, _):
        verify(folder, *PRIVATE)
        info = read_json_file(folder / "classifier.json")
        with _build_errors("classifier", location):
            classifier = _build_classifier(folder / "classifier.safetensors", info, info["adaptation"])
            classes = tuple(info["classes"])
            sample = load((folder / "sample.safetensors").read_bytes())
            images, image_classes = sample["images"], sample["classes"]
            guard_file = folder / "guard.json"
            guard = restore_detector(read_json_file(guard_file)) if guard_file.is_file() else None
        try:
            config = read_yaml(folder / "config.yaml")
        except ConfigError as error:
            raise BundleError(str(error)) from error
        metrics = read_json_file(folder / "metrics.json")
    return PrivateBundle(classifier, classes, config, metrics, guard, images, image_classes)


def load_plain_classifier(location: str | Path) -> nn.Module | None:
    """Load the classifier that the run trained on plain images first, or None if it trained none."""
    with local_folder(location, "private") as (folder, _):
        weights = folder / "plain_classifier.safetensors"
        if not weights.is_file():
            return None
        verify(folder)
        info = read_json_file(folder / "classifier.json")
        with _build_errors("plain classifier", location):
            return _build_classifier(weights, info, "none")


@contextmanager
def _build_errors(network: str, location: str | Path) -> Iterator[None]:
    """Convert the errors of options and weights that do not fit together into a BundleError."""
    try:
        yield
    except (ConfigError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"the {network} in {str(location)!r} cannot be built: {first_line(error)}") from error


def _build_classifier(weights: Path, info: dict[str, Any], adaptation: str) -> nn.Module:
    """Build the classifier that ``classifier.json`` describes, frozen and in evaluation mode."""
    options = CLASSIFIERS.options(info["classifier"]["name"]).model_validate(info["classifier"])
    height, width = info["image_size"]
    classifier = build_classifier(
        options, adaptation, num_classes=len(info["classes"]), channels=info["channels"], image_size=(height, width)
    )
    classifier.load_state_dict(load(weights.read_bytes()))
    return classifier.eval().requires_grad_(False)


def _check_key(key: Key | None, identifier: str, location: str | Path) -> None:
    if key is None:
        raise BundleError(
            f"the protection in {str(location)!r} needs its key {identifier}: --key FILE; its owner has it as "
            f"private/{FILE}"
        )
    if key.identifier != identifier:
        raise BundleError(f"the key {key.identifier} is not that of {str(location)!r}, which is {identifier}")
