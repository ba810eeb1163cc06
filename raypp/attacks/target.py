"""Whom attacks are run against: a bundle, any protection given as a Python function, or two folders of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from raypp.attacks.base import AttackerKnowledge, ImageMap
from raypp.attacks.user_function import source_of, user_function
from raypp.bundle.load import PublicBundle, load_plain_classifier, load_private, load_public
from raypp.bundle.manifest import MANIFEST
from raypp.config.overrides import deep_merge
from raypp.config.schema import Config
from raypp.config.validation import validate
from raypp.data.base import ImageDataset
from raypp.data.splits import load_split
from raypp.metrics.image import MIN_SIDE
from raypp.protections import PROTECTIONS
from raypp.utils import image_files, images
from raypp.utils.errors import ConfigError, DataError
from raypp.utils.keys import Key
from raypp.utils.storage import Storage

KNOWN_PAIRS = 8  # that a bundle's attacker at T3 has
MIN_PAIRS = 20  # that two folders must hold
PART = 500


class TargetSpec(BaseModel):
    """Whom to attack; exactly one of ``bundle``, ``function`` and ``folders``.

    Attributes:
        bundle: path or URI of a bundle.
        function: ``module:name`` or ``file.py:name`` of a function from and to NumPy uint8 (N, H, W, C).
        search: where a function's module is looked for first, since workers run in folders of their own.
        folders: plain images and protected ones of the same names.
        config: where a bundle's or a function's images come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str | None = None
    function: str | None = None
    search: str | None = None
    folders: tuple[str, str] | None = None
    config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """How reports call it."""
        if self.folders:
            return self.folders[1]
        return str(self.bundle or self.function)


@dataclass(frozen=True)
class Target:
    """Whom attacks are run against, and what they are measured on.

    Attributes:
        label: what it is, in a few words.
        access: everything that any attacker may touch.
        plain: the queries' originals, uint8 (N, C, H, W).
        protected: what attackers get of them, uint8 (N, C, H', W').
        labels: int64 (N,).
        gallery: images among which the originals are looked for, uint8 (M, C, H, W), with ``gallery_labels``.
        truth: int64 (N,), the originals' places in the gallery.
        classes: names of labels; none where they are not known.
        plain_classifier: one that was trained on plain images for its own sake, where the bundle has it.
        source: the SHA-256 of a function's file, or of a bundle's public manifest.
    """

    name: str
    label: str
    access: AttackerKnowledge
    plain: Tensor
    protected: Tensor
    labels: Tensor
    gallery: Tensor
    gallery_labels: Tensor
    truth: Tensor
    classes: tuple[str, ...]
    config: Config | None = None
    metrics: dict[str, Any] | None = None
    plain_classifier: nn.Module | None = None
    source: str | None = None

    @property
    def identity(self) -> str:
        """Of what is attacked: two victims of one identity may share a scorecard. Functions and protections with a key
        per image are random, so they are told by their files and not by what they give."""
        if self.source is None:
            return self.fingerprint
        plain = hashlib.sha256(self.plain.cpu().contiguous().numpy().tobytes()).hexdigest()
        return hashlib.sha256(f"{self.source} {plain}".encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Of what is measured: originals and their protected versions."""
        digest = hashlib.sha256(self.plain.cpu().contiguous().numpy().tobytes())
        digest.update(self.protected.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_target(
    spec: TargetSpec,
    *,
    num_queries: int,
    num_images: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Target:
    """Load a victim, and the images of its attackers and of the measurement.

    Args:
        num_queries: images that are attacked, at most.
        num_images: images of his own that an attacker has, at most; None for all of the training split.
        seed: which images are taken.

    Raises:
        RayppError: one sentence about what cannot be used.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if spec.folders is not None:
        return _folders(spec.folders, num_queries, num_images, seed, device)
    if spec.function is not None:
        return _function(spec, num_queries, num_images, seed, device)
    if spec.bundle is None:
        raise ConfigError("no victim is given; name a bundle, a function or two folders of images")
    return _bundle(spec, num_queries, num_images, seed, device)


def _bundle(spec: TargetSpec, num_queries: int, num_images: int | None, seed: int, device: torch.device) -> Target:
    assert spec.bundle is not None
    public, private = load_public(spec.bundle), load_private(spec.bundle)
    config = validate(deep_merge(private.config, spec.config or {}))
    protection = public.protection.to(device)
    classifier = private.classifier.to(device)
    kind = type(protection)

    def gradients(images: Tensor) -> Tensor:
        protected: Tensor = protection(images)
        return protected

    def fresh(number: int) -> ImageMap:
        key = Key(hashlib.sha256(f"attacker's own key {number}".encode()).digest())
        built = PROTECTIONS.build(_options(public), channels=public.channels, key=key)
        own: ImageMap = built.to(device).eval().protect
        return own

    @torch.inference_mode()
    def classify(protected: Tensor) -> Tensor:
        parts = protected.to(device).split(PART)
        return torch.cat([classifier(part.float() / 255).argmax(1) for part in parts])

    def protect(images: Tensor) -> Tensor:
        return protection.protect(images.to(device))

    keyed = kind.needs_key(_options(public))
    access = AttackerKnowledge(
        shape=(0, 0, 0),
        structure=kind.adaptation,
        fresh=fresh if keyed else None,
        protect=protect,
        gradients=gradients if kind.differentiable else None,
        classify=classify,
        device=device,
    )
    plain_classifier = load_plain_classifier(spec.bundle)
    found = _split_images(spec.bundle, access, config, private.classes, num_queries, num_images, seed)
    return replace(
        found,
        label=_label(config),
        source=hashlib.sha256(Storage(spec.bundle).folder("public").read(MANIFEST)).hexdigest(),
        metrics=private.metrics,
        plain_classifier=plain_classifier.to(device) if plain_classifier is not None else None,
    )


def _label(config: Config) -> str:
    kind = PROTECTIONS.get(config.protection.name)
    bits = kind.bits(config.protection)
    if bits is not None:
        return f"{config.protection.name}, {bits:.4g} bits"
    alpha = f", alpha = {config.train.alpha:g}" if kind.uses_features(config.protection, 1.0) else ""
    return f"{config.protection.name}{alpha}"


def _options(public: PublicBundle) -> Any:
    about = public.about["protection"]
    return PROTECTIONS.options(about["name"]).model_validate(about)


def _function(spec: TargetSpec, num_queries: int, num_images: int | None, seed: int, device: torch.device) -> Target:
    assert spec.function is not None
    config = validate(spec.config or {})
    protect = user_function(spec.function, device, spec.search)
    access = AttackerKnowledge(shape=(0, 0, 0), protect=protect, device=device)
    found = _split_images(spec.function, access, config, None, num_queries, num_images, seed)
    return replace(found, source=source_of(spec.function))


def _split_images(
    name: str,
    access: AttackerKnowledge,
    config: Config,
    classes: tuple[str, ...] | None,
    num_queries: int,
    num_images: int | None,
    seed: int,
) -> Target:
    """Fill in images: the training split for attackers, the test split as gallery and queries."""
    device = access.device
    train, test = load_split(config, "train"), load_split(config, "test")
    if classes is not None and test.classes != classes:
        raise DataError(f"data.source has the classes {', '.join(test.classes)}; the bundle reads {', '.join(classes)}")
    _large_enough(test.images.shape[1:3])
    random = np.random.default_rng(seed)
    order = random.permutation(len(train))[:num_images]
    if len(order) < 2:
        raise DataError(f"data.source has {len(order)} images for attackers; allowed are two or more")
    known = _tensors(train.subset(order), device)
    gallery, gallery_labels = _tensors(test, device)
    truth = torch.from_numpy(random.permutation(len(test))[:num_queries]).to(device)
    plain = gallery[truth]
    protect = access.protect
    assert protect is not None
    protected = _in_parts(protect, plain)
    half = len(known[0]) // 2  # a GAN's protected images are of other originals than its plain ones
    access = replace(
        access,
        shape=(plain.shape[1], plain.shape[2], plain.shape[3]),
        images=known[0],
        labels=known[1],
        num_classes=len(test.classes),
        ciphertexts=lambda: (known[0][:half], known[1][:half], _in_parts(protect, known[0][half:]), known[1][half:]),
        pairs=(known[0][:KNOWN_PAIRS], protect(known[0][:KNOWN_PAIRS])),
        gallery=gallery,
    )
    labels = gallery_labels[truth]
    return Target(name, name, access, plain, protected, labels, gallery, gallery_labels, truth, test.classes, config)


def _folders(
    folders: tuple[str, str], num_queries: int, num_images: int | None, seed: int, device: torch.device
) -> Target:
    plain, protected = (_read_folder(Path(folder)) for folder in folders)
    for one, other, where in ((plain, protected, folders[1]), (protected, plain, folders[0])):
        if lacking := sorted(one.keys() - other.keys()):
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise DataError(
                f"folder {where!r} has no image {lacking[0]!r}{more}; plain and protected images need the same names"
            )
    if len(plain) < MIN_PAIRS:
        raise DataError(f"folder {folders[0]!r} holds {len(plain)} images; allowed are {MIN_PAIRS} or more")
    names = sorted(plain)
    first, second = (
        _stack([part[name] for name in names], names, folder)
        for part, folder in zip((plain, protected), folders, strict=True)
    )
    _large_enough(first.shape[2:])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(names)))
    num = min(num_queries, len(names) // 5)
    truth, known = order[:num].to(device), order[num:][:num_images].to(device)
    first, second = first.to(device), second.to(device)
    half = len(known) // 2
    none = torch.zeros(len(names), dtype=torch.int64, device=device)
    access = AttackerKnowledge(
        shape=(first.shape[1], first.shape[2], first.shape[3]),
        images=first[known],
        labels=none[known],
        ciphertexts=lambda: (first[known[:half]], none[known[:half]], second[known[half:]], none[known[half:]]),
        pairs=(first[known], second[known]),
        gallery=first,
        device=device,
    )
    return Target(
        folders[1], Path(folders[1]).name, access, first[truth], second[truth], none[truth], first, none, truth, ()
    )


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Images below a folder by their paths without suffix."""
    found: dict[str, np.ndarray] = {}
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder")
    for path in image_files.find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise DataError(f"{str(folder)!r} has two images named {name!r}")
        try:
            found[name] = images.decode(path.read_bytes(), name=str(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return found


def _stack(images: list[np.ndarray], names: list[str], folder: str) -> Tensor:
    for name, image in zip(names, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{folder}/{name} is {image.shape[0]} x {image.shape[1]}, {names[0]} is {images[0].shape[0]} x "
                f"{images[0].shape[1]}; images of a folder must have one size"
            )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _tensors(images: ImageDataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels on the device."""
    pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2).contiguous()
    return pixels.to(device), torch.from_numpy(images.labels).to(device)


def _in_parts(protect: ImageMap, images: Tensor) -> Tensor:
    return torch.cat([protect(part) for part in images.split(PART)])


def _large_enough(size: tuple[int, ...]) -> None:
    if min(size) < MIN_SIDE:
        raise DataError(f"images are {size[0]} x {size[1]} pixels; leakage is measured on sides of {MIN_SIDE} or more")
