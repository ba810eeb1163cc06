"""A loaded model: classifier, input detector and attack data of one bundle."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raypp.bundle.guard import PlainImageDetector, trace_detector
from raypp.bundle.load import PrivateBundle, PublicBundle, load_private, load_public
from raypp.bundle.manifest import MANIFEST, verify
from raypp.models.fusion import fuse_conv_bn
from raypp.models.tracing import trace_forward
from raypp.serve.image_parsing import Shape
from raypp.utils.device import default_device
from raypp.utils.errors import BundleError, RayppError, StorageError
from raypp.utils.paths import short_name
from raypp.utils.storage import Storage, sha256

MAX_READS = 3  # attempts to read a bundle that is replaced meanwhile
EPOCH = (1980, 1, 1, 0, 0, 0)  # time of every file in an archive, so that equal parts give equal bytes


@dataclass(frozen=True)
class AttackMaterial:
    """A bundle's public part with its key, and the weights of its attack networks by name of the attack."""

    public: PublicBundle
    networks: dict[str, bytes]


@dataclass(frozen=True)
class LoadedModel:
    """A loaded and checked bundle.

    Attributes:
        location: URI of its files.
        version: first 16 hexadecimal digits of the SHA-256 of the bundle's manifest.
        protection: SHA-256 of the public part's manifest; identifies the protection of a client's images.
        archive: the public part as a zip file.
        shape: (H, W, C) of protected images.
        plain: (H, W, C) of the plain images.
        private: the private part; its classifier is optimized for inference.
        attack_material: data of the attacks, read together with the scorecard; None unless requested.
        attachment: a service's own data, see :class:`raypp.serve.model_store.ModelManager`.
    """

    location: str
    version: str
    protection: str
    archive: bytes
    shape: Shape
    plain: Shape
    guard: PlainImageDetector | None
    private: PrivateBundle
    card: str
    scorecard: dict[str, Any] | None
    attack_material: AttackMaterial | None = None
    attachment: Any = None

    @property
    def name(self) -> str:
        """The last two parts of the location, such as ``first/bundle``."""
        return short_name(self.location)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities float (N, K) of protected images uint8 (N, C, H, W)."""
        classifier = self.private.classifier
        device = next(classifier.parameters()).device
        logits = pad_to_bucket(lambda batch: classifier(batch.to(device).float() / 255), images)
        return torch.softmax(logits.float(), dim=1).cpu()


def pad_to_bucket(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Run a network on images (N, C, H, W), padded to the next batch size of three significant bits.

    PyTorch caches compiled CPU kernels for every batch size. All sizes up to 128 need ten times the memory of these
    (docs/results/serving.md), which are at most a quarter larger than the batch.
    """
    step = 1 << max(0, (len(images) - 1).bit_length() - 3)
    num = -len(images) % step
    if not num:
        return function(images)
    return function(torch.cat([images, images.new_zeros(num, *images.shape[1:])]))[: len(images)]


def load_model(location: str | Path, *, attacks: bool = False) -> LoadedModel:
    """Load a bundle and run its self-check.

    All files are of one version: if the bundle changes meanwhile, for instance by a new attack, it is read again.

    Args:
        attacks: also load the data of its attacks.

    Raises:
        BundleError: it is missing, altered or incomplete, or fails its self-check.
        StorageError: it was replaced during every attempt.
    """
    for _ in range(MAX_READS):
        before = _manifest(location)
        try:
            model = _load(location, attacks)
        except (RayppError, OSError):
            if _manifest(location) == before:
                raise
        else:
            if _manifest(location) == before:
                return model
    raise StorageError(f"bundle {str(location)!r} was replaced by another one each of {MAX_READS} times it was read")


def _manifest(location: str | Path) -> bytes | None:
    try:
        return Storage(location).read(MANIFEST)
    except StorageError:
        return None


def _load(location: str | Path, attacks: bool) -> LoadedModel:
    storage = Storage(location)
    with storage.download("") as folder:
        private = load_private(folder)
        verify(folder)
        channels, height, width = private.sample.shape[1:]
        scorecard = folder / "private" / "scorecard.json"
        material = None
        if attacks:
            files = sorted((folder / "private" / "attacks").glob("*.safetensors"))
            material = AttackMaterial(load_public(folder), {file.stem: file.read_bytes() for file in files})
        model = LoadedModel(
            location=storage.uri,
            version=sha256(folder / MANIFEST)[:16],
            protection=sha256(folder / "public" / MANIFEST),
            archive=_archive(folder / "public"),
            shape=(height, width, channels),
            plain=_plain_shape(folder, location),
            guard=private.guard and trace_detector(private.guard, private.sample[:8]),
            private=private,
            card=(folder / "MODEL_CARD.md").read_text(),
            scorecard=json.loads(scorecard.read_text()) if scorecard.is_file() else None,
            attack_material=material,
        )
    device = default_device()
    classifier = fuse_conv_bn(private.classifier, private.sample[:8].float() / 255)
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    classifier = trace_forward(classifier, private.sample[:8].to(device).float() / 255)
    private = replace(private, classifier=classifier)  # the self-check covers the classifier that is served
    problem = private.problem()
    if problem is not None:
        raise BundleError(f"bundle {str(location)!r} fails its self-check: {problem}")
    return replace(model, private=private)


def _plain_shape(folder: Path, location: str | Path) -> Shape:
    try:
        config = json.loads((folder / "public" / "protection.json").read_text())
        height, width = config["image_size"]
        return height, width, config["channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"bundle {str(location)!r} does not state the size of its plain images") from error


def _archive(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # weights do not compress
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix(), EPOCH), path.read_bytes())
    return buffer.getvalue()


Inference = tuple[LoadedModel, Tensor]
"""A request: the model, and protected images uint8 (N, C, H, W)."""


@torch.inference_mode()
def classify(jobs: list[Inference]) -> list[tuple[Tensor, Tensor]]:
    """Probabilities float (N, K) for each request, and whether each of its images looks protected, bool (N,)."""
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for model in {id(model): model for model, _ in jobs}.values():
        batch = {i: images for i, (other, images) in enumerate(jobs) if other is model}
        images, sizes = torch.cat(list(batch.values())), [len(images) for images in batch.values()]
        guard = model.guard
        protected = guard.is_protected(images) if guard is not None else torch.ones(len(images), dtype=torch.bool)
        parts = zip(model.probabilities(images).split(sizes), protected.split(sizes), strict=True)
        results |= dict(zip(batch, parts, strict=True))
    return [results[i] for i in range(len(jobs))]
