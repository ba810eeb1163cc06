"""Targets of attacks: a bundle, a protection as a Python function, or two folders of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from raypp.attacks.base import AttackerKnowledge, ImageMap, protect_in_batches, required, tensor_sha256
from raypp.attacks.statements import logits_of, stated_noise_std
from raypp.attacks.user_function import source_of, user_function
from raypp.bundle.load import load_plain_classifier, load_private, load_public
from raypp.bundle.manifest import MANIFEST
from raypp.config.overrides import deep_merge
from raypp.config.schema import Config
from raypp.config.validation import validate
from raypp.data.base import ImageDataset
from raypp.data.splits import load_split
from raypp.metrics.image import MIN_SIDE
from raypp.metrics.matchers import build_matchers
from raypp.metrics.retrieval import Features, has_near_duplicate
from raypp.models.layers import logits_in_batches
from raypp.protections import PROTECTIONS
from raypp.utils import image_files
from raypp.utils.device import default_device
from raypp.utils.errors import ConfigError, DataError
from raypp.utils.images import channels_first, decode
from raypp.utils.keys import Key
from raypp.utils.storage import Storage

KNOWN_PAIRS = 8  # pairs of an attacker at T3 on a bundle
MIN_PAIRS = 20  # of two folders


class TargetSpec(BaseModel):
    """The target to load; exactly one of ``bundle``, ``function`` and ``folders``.

    Attributes:
        bundle: path or URI of a bundle.
        function: ``module:name`` or ``file.py:name`` of a function from and to NumPy uint8 (N, H, W, C).
        search: first folder to search for a function's module, because workers run in other folders.
        folders: a folder of plain images, and one of protected images with the same names.
        config: configuration of a bundle's or function's images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str | None = None
    function: str | None = None
    search: str | None = None
    folders: tuple[str, str] | None = None
    config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Name in reports."""
        return self.folders[1] if self.folders else str(self.bundle or self.function)


@dataclass(frozen=True)
class Target:
    """A target with the images for its attacks and their measurement.

    Attributes:
        label: short description for reports.
        access: knowledge of the strongest attacker.
        plain: originals of the queries, uint8 (N, C, H, W).
        protected: the queries, uint8 (N, C, H', W').
        labels: classes of the queries, int64 (N,).
        gallery: images that contain the originals, uint8 (M, C, H, W), with ``gallery_labels``.
        truth: indices of the originals in the gallery, int64 (N,).
        classes: class names; empty if they are unknown.
        plain_classifier: the bundle's classifier of plain images, if it has one.
        source: SHA-256 of a function's file, or of a bundle's public manifest.
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
        """Hash of the attacked protection and images; targets of equal identity may share a scorecard.

        It uses the source file where there is one, because outputs of a random protection differ.
        """
        if self.source is None:
            return self.fingerprint
        return hashlib.sha256(f"{self.source} {tensor_sha256(self.plain)}".encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hash of the originals and their protected versions."""
        return tensor_sha256(self.plain, self.protected)

    @cached_property
    def matchers(self) -> dict[str, Features]:
        """Features by matcher, see :func:`raypp.metrics.matchers.build_matchers`."""
        return build_matchers(required(self.access.images).to(self.gallery.device))

    @cached_property
    def is_seen(self) -> Tensor:
        """Whether the attacker's own images have a near-duplicate of each original, bool (N,)."""
        return has_near_duplicate(self.plain, required(self.access.images).to(self.plain.device))


class _Selection(NamedTuple):
    """Numbers of images as in :func:`load_target`, and the seed that selects them."""

    num_queries: int
    num_images: int | None
    seed: int


def load_target(
    spec: TargetSpec,
    *,
    num_queries: int,
    num_images: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Target:
    """Load a target with the images for its attacks and their measurement.

    Args:
        num_queries: most images to attack.
        num_images: most images of the attacker; None for the whole training split.
        seed: seed of the selection of images.

    Raises:
        RayppError: the target or its images cannot be loaded.
    """
    device = device or default_device()
    selection = _Selection(num_queries, num_images, seed)
    if spec.folders is not None:
        return _load_folders(spec.folders, selection, device)
    if spec.function is not None:
        config = validate(spec.config or {})
        protect = user_function(spec.function, device, spec.search)
        noise_std = stated_noise_std(protect, spec.function)
        access = AttackerKnowledge(shape=(0, 0, 0), protect=protect, noise_std=noise_std, device=device)
        return replace(_build_target(spec.function, access, config, None, selection), source=source_of(spec.function))
    if spec.bundle is None:
        raise ConfigError("the target is empty; name a bundle, a function or two folders of images")
    return _load_bundle(spec.bundle, spec.config or {}, selection, device)


def _load_bundle(bundle: str, overrides: dict[str, Any], selection: _Selection, device: torch.device) -> Target:
    public, private = load_public(bundle), load_private(bundle)
    config = validate(deep_merge(private.config, overrides))
    protection = public.protection.to(device)
    classifier = private.classifier.to(device)
    kind, about = type(protection), public.about["protection"]
    options = PROTECTIONS.options(about["name"]).model_validate(about)

    def fresh(number: int) -> ImageMap:
        key = Key(hashlib.sha256(f"attacker's own key {number}".encode()).digest())
        with_own_key: ImageMap = PROTECTIONS.build(options, channels=public.channels, key=key).to(device).eval().protect
        return with_own_key

    access = AttackerKnowledge(
        shape=(0, 0, 0),
        structure=kind.adaptation,
        fresh=fresh if kind.needs_key(options) else None,
        protect=lambda images: protection.protect(images.to(device)),
        noise_std=stated_noise_std(protection, about["name"]),
        gradients=protection if kind.differentiable else None,
        logits=logits_of(protection),
        classify=lambda protected: logits_in_batches(classifier, protected.to(device)).argmax(1),
        device=device,
    )
    plain_classifier = load_plain_classifier(bundle)
    return replace(
        _build_target(bundle, access, config, private.classes, selection),
        label=_label(config),
        source=hashlib.sha256(Storage(bundle).folder("public").read(MANIFEST)).hexdigest(),
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


def _build_target(
    name: str, access: AttackerKnowledge, config: Config, classes: tuple[str, ...] | None, selection: _Selection
) -> Target:
    """Add images to ``access``: the training split for attackers, the test split as gallery and queries."""
    device, protect = access.device, required(access.protect)
    train, test = load_split(config, "train"), load_split(config, "test")
    if classes is not None and test.classes != classes:
        raise DataError(f"data.source has the classes {', '.join(test.classes)}; the bundle reads {', '.join(classes)}")
    check_image_size(test.images.shape[1:3])
    rng = np.random.default_rng(selection.seed)
    order = rng.permutation(len(train))[: selection.num_images]
    if len(order) < 2:
        raise DataError(f"data.source has {len(order)} images for attackers; allowed are two or more")
    images, labels = _tensors(train.subset(order), device)
    gallery, gallery_labels = _tensors(test, device)
    truth = torch.from_numpy(rng.permutation(len(test))[: selection.num_queries]).to(device)
    plain = gallery[truth]
    protected = protect_in_batches(protect, plain)
    access = replace(
        access.with_images(images, labels),
        shape=(plain.shape[1], plain.shape[2], plain.shape[3]),
        num_classes=len(test.classes),
        pairs=(images[:KNOWN_PAIRS], protect(images[:KNOWN_PAIRS])),
        gallery=gallery,
    )
    query_labels = gallery_labels[truth]
    return Target(
        name, name, access, plain, protected, query_labels, gallery, gallery_labels, truth, test.classes, config
    )


def _load_folders(folders: tuple[str, str], selection: _Selection, device: torch.device) -> Target:
    plain, protected = _read_pairs(folders)
    check_image_size(plain.shape[2:])
    order = torch.from_numpy(np.random.default_rng(selection.seed).permutation(len(plain)))
    num = min(selection.num_queries, len(plain) // 5)
    num_known = len(plain) - num if selection.num_images is None else min(selection.num_images, len(plain) - num)
    queries, known = order[:num].to(device), order[num : num + num_known].to(device)
    plain, protected = plain.to(device), protected.to(device)
    # The attacker knows the protected versions of its own images, so they are no candidates.
    gallery = plain[torch.cat((queries, order[num + num_known :].to(device)))]
    half = num_known // 2
    labels = torch.zeros(len(plain), dtype=torch.int64, device=device)
    access = AttackerKnowledge(
        shape=(plain.shape[1], plain.shape[2], plain.shape[3]),
        images=plain[known],
        labels=labels[known],
        ciphertexts=lambda: (plain[known[:half]], labels[known[:half]], protected[known[half:]], labels[known[half:]]),
        pairs=(plain[known], protected[known]),
        gallery=gallery,
        device=device,
    )
    truth = torch.arange(num, device=device)
    label, classes = Path(folders[1]).name, labels[: len(gallery)]
    return Target(
        folders[1], label, access, plain[queries], protected[queries], classes[:num], gallery, classes, truth, ()
    )


def _read_pairs(folders: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Read plain and protected images uint8 (N, C, H, W) in the order of their names; check that they match."""
    plain, protected = (_read_folder(Path(folder)) for folder in folders)
    for images, others, folder in ((plain, protected, folders[1]), (protected, plain, folders[0])):
        if missing := sorted(images.keys() - others.keys()):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"folder {folder!r} has no image {missing[0]!r}{more}; plain and protected images need the same names"
            )
    if len(plain) < MIN_PAIRS:
        raise DataError(f"folder {folders[0]!r} holds {len(plain)} images; allowed are {MIN_PAIRS} or more")
    return _stack(plain, folders[0]), _stack(protected, folders[1])


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Read the images below a folder, by their paths without suffix."""
    decoded: dict[str, np.ndarray] = {}
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is not a folder")
    for path in image_files.find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in decoded:
            raise DataError(f"{str(folder)!r} has two images named {name!r}")
        try:
            decoded[name] = decode(path.read_bytes(), name=str(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return decoded


def _stack(images: dict[str, np.ndarray], folder: str) -> Tensor:
    names = sorted(images)
    height, width, _ = images[names[0]].shape
    for name in names:
        size = images[name].shape
        if size[:2] != (height, width):
            raise DataError(
                f"{folder}/{name} is {size[0]} x {size[1]}, {names[0]} is {height} x {width}; images of a folder must "
                "have one size"
            )
    return channels_first(np.stack([images[name] for name in names]))


def _tensors(dataset: ImageDataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels on the device."""
    return channels_first(dataset.images).to(device), torch.from_numpy(dataset.labels).to(device)


def check_image_size(size: tuple[int, ...]) -> None:
    if min(size) < MIN_SIDE:
        raise DataError(f"images are {size[0]} x {size[1]} pixels; leakage is measured on sides of {MIN_SIDE} or more")
