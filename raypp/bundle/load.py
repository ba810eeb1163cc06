"""Load the public or the private part of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from raypp.bundle.guard import PlainImageDetector, restore_detector
from raypp.bundle.manifest import PRIVATE, listed_files, local_folder, read_json_file, verify
from raypp.config.presets import read_yaml
from raypp.models import CLASSIFIERS
from raypp.models.adaptation import build_classifier
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.utils.errors import BundleError, ConfigError, first_line
from raypp.utils.keys import FILE, Key

SAME_ANSWERS = 0.9  # of a sample: another processor rounds otherwise, and some images lie between two classes


@dataclass(frozen=True)
class PublicBundle:
    """What a client needs: a protection in evaluation mode and the images it is made for; a keyed one with its key."""

    protection: Protection
    channels: int
    image_size: tuple[int, int]
    """Height and width of the images it was trained on."""
    about: dict[str, Any]


@dataclass(frozen=True)
class PrivateBundle:
    """What the classifier's owner keeps: classifier, its classes, configuration and measured numbers."""

    classifier: nn.Module
    classes: tuple[str, ...]
    config: dict[str, Any]
    metrics: dict[str, Any]
    guard: PlainImageDetector | None
    sample: Tensor
    """Protected test images uint8 (n, C, H, W), and ``sample_classes`` int64 (n,), what the classifier made of them."""
    sample_classes: Tensor

    @torch.inference_mode()
    def problem(self) -> str | None:
        """Why the classifier does not do what it did when the bundle was made, or None."""
        device = next(self.classifier.parameters()).device
        images, classes = self.sample.to(device), self.sample_classes.to(device)
        logits = self.classifier(images.float() / 255)
        if not bool(torch.isfinite(logits).all()):
            return "its answers are not finite numbers"
        agree = int((logits.argmax(1) == classes).sum())
        if agree < SAME_ANSWERS * len(classes):
            return f"it gives the recorded answer for {agree} of {len(classes)} images of its sample"
        return None


def load_public(location: str | Path, key: Key | None = None) -> PublicBundle:
    """Load and verify the public part of a bundle, given the bundle or its ``public`` folder (path or URI).

    Args:
        key: the key of a keyed protection; not needed beside the private part, which holds it.

    Raises:
        BundleError: the bundle is missing, altered or incomplete, or ``key`` is missing, another one or not needed.
        ConfigError: the private part's key file is damaged.
    """
    with local_folder(location, "public") as (folder, whole):
        given = key is not None
        beside = folder.parent / "private" / FILE
        if key is None and whole and beside.is_file():
            key = Key.read(beside)
        manifest = verify(folder)
        listed_files(manifest, folder, "protection.json", "protection.safetensors")
        about = read_json_file(folder / "protection.json")
        try:
            options = PROTECTIONS.options(about["protection"]["name"]).model_validate(about["protection"])
            if PROTECTIONS.get(options.name).needs_key(options):
                _same_key(key, about["key"], location)
            elif given:
                raise BundleError(f"the protection {options.name!r} in {str(location)!r} has no key; leave it out")
            protection: Protection = PROTECTIONS.build(options, channels=about["channels"], key=key)
            protection.load_state_dict(load((folder / "protection.safetensors").read_bytes()))
            height, width = (int(side) for side in about["image_size"])
            if min(height, width) < 1 or about["channels"] not in (1, 3):
                raise ValueError(f"it reads no images of {height} x {width} with {about['channels']} channels")
        except (ConfigError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise BundleError(f"the protection in {str(location)!r} cannot be built: {first_line(error)}") from error
    protection.eval().requires_grad_(False)
    return PublicBundle(protection, about["channels"], (height, width), about)


def load_private(location: str | Path) -> PrivateBundle:
    """Load and verify the private part of a bundle, given the bundle or its ``private`` folder (path or URI)."""
    with local_folder(location, "private") as (folder, _):
        manifest = verify(folder)
        listed_files(manifest, folder, *PRIVATE)
        about = read_json_file(folder / "classifier.json")
        try:
            classes = tuple(about["classes"])
            options = CLASSIFIERS.options(about["classifier"]["name"]).model_validate(about["classifier"])
            height, width = about["image_size"]
            net = build_classifier(
                options,
                about["adaptation"],
                num_classes=len(classes),
                channels=about["channels"],
                image_size=(height, width),
            )
            net.load_state_dict(load((folder / "classifier.safetensors").read_bytes()))
            sample = load((folder / "sample.safetensors").read_bytes())
            images, made = sample["images"], sample["classes"]
            found = folder / "guard.json"
            guard = restore_detector(read_json_file(found)) if found.is_file() else None
        except (ConfigError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise BundleError(f"the classifier in {str(location)!r} cannot be built: {first_line(error)}") from error
        try:
            config = read_yaml(folder / "config.yaml")
        except ConfigError as error:
            raise BundleError(str(error)) from error
        metrics = read_json_file(folder / "metrics.json")
    net.eval().requires_grad_(False)
    return PrivateBundle(net, classes, config, metrics, guard, images, made)


def load_plain_classifier(location: str | Path) -> nn.Module | None:
    """The classifier that a bundle's run trained on plain images first, or None where it trained none."""
    with local_folder(location, "private") as (folder, _):
        file = folder / "plain_classifier.safetensors"
        if not file.is_file():
            return None
        verify(folder)
        about = read_json_file(folder / "classifier.json")
        try:
            options = CLASSIFIERS.options(about["classifier"]["name"]).model_validate(about["classifier"])
            net = build_classifier(
                options,
                "none",
                num_classes=len(about["classes"]),
                channels=about["channels"],
                image_size=tuple(about["image_size"]),
            )
            net.load_state_dict(load(file.read_bytes()))
        except (ConfigError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise BundleError(
                f"the plain classifier in {str(location)!r} cannot be built: {first_line(error)}"
            ) from error
    net.eval().requires_grad_(False)
    return net


def _same_key(key: Key | None, identifier: str, location: str | Path) -> None:
    if key is None:
        raise BundleError(
            f"the protection in {str(location)!r} needs its key {identifier}: --key FILE; its owner has it as "
            f"private/{FILE}"
        )
    if key.identifier != identifier:
        raise BundleError(f"the key {key.identifier} is not that of {str(location)!r}, which is {identifier}")
