"""A loaded model: classifier, input detector and attack data of one bundle."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from raypp.bundle.guard import PlainImageDetector
from raypp.bundle.load import PrivateBundle, PublicBundle, load_private, load_public
from raypp.bundle.manifest import MANIFEST, verify
from raypp.models.fusion import fuse_conv_bn
from raypp.utils.errors import BundleError, RayppError, StorageError
from raypp.utils.storage import Storage

MAX_READS = 3  # of a bundle that is replaced while it is read
NUM_KEPT = 3  # bundles in memory: clients that protected with an earlier one are still answered
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in an archive, so that equal parts are equal bytes


@dataclass(frozen=True)
class AttackMaterial:
    """A bundle's public part, with its key, and the weights of its attack networks by the attacks' names."""

    public: PublicBundle
    networks: dict[str, bytes]


@dataclass(frozen=True)
class LoadedModel:
    """A bundle that has been loaded and checked.

    Attributes:
        location: where its files lie.
        version: of the whole bundle, 16 hexadecimal digits of its manifest's SHA-256.
        protection: of its public part, the SHA-256 of that part's manifest: what a client protected with.
        archive: the public part as a zip file.
        shape: (H, W, C) of protected images.
        plain: (H, W, C) of the images that they are made of.
        attack_material: what attacks are made of, read together with the scorecard; None where it was not asked for.
    """

    location: str
    version: str
    protection: str
    archive: bytes
    shape: tuple[int, int, int]
    plain: tuple[int, int, int]
    classes: tuple[str, ...]
    classifier: nn.Module
    guard: PlainImageDetector | None
    private: PrivateBundle
    card: str
    scorecard: dict[str, Any] | None
    attack_material: AttackMaterial | None = None

    @property
    def name(self) -> str:
        """The last two parts of where it lies, such as ``first/bundle``: without the machine's paths."""
        return "/".join(urlsplit(self.location).path.rstrip("/").split("/")[-2:])

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Of each class, float (N, K), for protected images uint8 (N, C, H, W)."""
        device = next(self.classifier.parameters()).device
        logits = pad_to_bucket(lambda batch: self.classifier(batch.to(device).float() / 255), images)
        return torch.softmax(logits.float(), dim=1).cpu()


def pad_to_bucket(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A network's output for images (N, C, H, W), computed in a batch of the next size of three significant bits.

    The CPU's kernels are compiled and kept for every batch size that comes: all sizes up to 128 take ten times the
    memory (docs/results.md, Serving) that the sizes here do, which are at most a quarter larger.
    """
    step = 1 << max(0, (len(images) - 1).bit_length() - 3)
    padding = images.new_zeros(-len(images) % step, *images.shape[1:])
    return function(torch.cat([images, padding]))[: len(images)]


def load_model(location: str | Path, device: torch.device | None = None, *, attacks: bool = False) -> LoadedModel:
    """Load a bundle and check that it does what it did when it was made.

    Everything is of one version: a bundle that is attacked again meanwhile is read again.

    Args:
        attacks: also load what its attacks are made of.

    Raises:
        BundleError: it is missing, altered or incomplete, or its classifier gives other answers.
        StorageError: it is replaced by another one each time that it is read.
    """
    for _ in range(MAX_READS):
        before = _manifest(location)
        try:
            served = _load(location, device, attacks)
        except (RayppError, OSError):
            if _manifest(location) == before:
                raise
        else:
            if _manifest(location) == before:
                return served
    raise StorageError(f"bundle {str(location)!r} was replaced by another one each of {MAX_READS} times it was read")


def _manifest(location: str | Path) -> bytes | None:
    try:
        return Storage(location).read(MANIFEST)
    except StorageError:
        return None


def _load(location: str | Path, device: torch.device | None, attacks: bool) -> LoadedModel:
    with Storage(location).download("") as folder:
        private = load_private(folder)
        verify(folder)
        whole = (folder / MANIFEST).read_bytes()
        public = (folder / "public" / MANIFEST).read_bytes()
        try:
            protects = json.loads((folder / "public" / "protection.json").read_text())
            plain = (*protects["image_size"], protects["channels"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"bundle {str(location)!r} does not say what images it protects") from error
        archive = _archive(folder / "public")
        card = (folder / "MODEL_CARD.md").read_text()
        found = folder / "private" / "scorecard.json"
        scorecard = json.loads(found.read_text()) if found.is_file() else None
        material = None
        if attacks:
            files = sorted((folder / "private" / "attacks").glob("*.safetensors"))
            networks = {file.stem: file.read_bytes() for file in files}
            material = AttackMaterial(load_public(folder), networks)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = fuse_conv_bn(private.classifier, private.sample[:8].float() / 255)
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    private = replace(private, classifier=classifier)  # what is checked, now and later, is what answers
    problem = private.problem()
    if problem is not None:
        raise BundleError(f"bundle {str(location)!r} fails its self-check: {problem}")
    channels, height, width = private.sample.shape[1:]
    return LoadedModel(
        Storage(location).uri,
        hashlib.sha256(whole).hexdigest()[:16],
        hashlib.sha256(public).hexdigest(),
        archive,
        (height, width, channels),
        plain,
        private.classes,
        classifier,
        private.guard,
        private,
        card,
        scorecard,
        material,
    )


def _archive(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # weights do not compress
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix(), EPOCH), path.read_bytes())
    return buffer.getvalue()


Inference = tuple[LoadedModel, Tensor]
"""A request: the bundle that answers it, and protected images uint8 (N, C, H, W)."""


@torch.inference_mode()
def classify(jobs: list[Inference]) -> list[tuple[Tensor, Tensor]]:
    """Classes and what looks protected, of the images of several requests at once."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, (served, _) in enumerate(jobs):
        groups[id(served)].append(i)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for places in groups.values():
        served = jobs[places[0]][0]
        images = torch.cat([jobs[i][1] for i in places]) if len(places) > 1 else jobs[places[0]][1]
        guard = served.guard
        protected = guard.is_protected(images) if guard is not None else torch.ones(len(images), dtype=torch.bool)
        probabilities = served.probabilities(images)
        sizes = [len(jobs[i][1]) for i in places]
        parts = zip(probabilities.split(sizes), protected.split(sizes), strict=True)
        found |= dict(zip(places, parts, strict=True))
    return [found[i] for i in range(len(jobs))]
