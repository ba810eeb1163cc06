"""What is served: a bundle, loaded and checked, and how a newer one takes its place while requests are answered.

A *shelf* is a folder with bundles under ``versions/`` and a file ``live.json`` that names one of them. A service looks
at that file every few seconds. What it names next is loaded and checked beside the bundle that is being served, and
takes over only if it does what it did when it was made; else the old one stays and the reason is shown.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from raypp import bundle as bundles
from raypp.bundle.guard import Guard
from raypp.models.fusion import folded
from raypp.utils.errors import BundleError, RayppError, StorageError
from raypp.utils.storage import Storage

LIVE = "live.json"
RETRY_SECONDS = 60.0  # until a bundle that did not work is tried again
MAX_READS = 3  # of a bundle that is replaced while it is read
NUM_KEPT = 3  # bundles in memory: clients that protected with an earlier one are still answered
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in an archive, so that equal parts are equal bytes


@dataclass(frozen=True)
class AttackMaterial:
    """A bundle's public part, with its key, and the weights of its attack networks by the attacks' names."""

    public: bundles.PublicBundle
    networks: dict[str, bytes]


@dataclass(frozen=True)
class Served:
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
    guard: Guard | None
    private: bundles.PrivateBundle
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
        logits = in_few_sizes(lambda batch: self.classifier(batch.to(device).float() / 255), images)
        return torch.softmax(logits.float(), dim=1).cpu()


def in_few_sizes(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A network's output for images (N, C, H, W), computed in a batch of the next size of three significant bits.

    The CPU's kernels are compiled and kept for every batch size that comes: all sizes up to 128 take ten times the
    memory (docs/results.md, Serving) that the sizes here do, which are at most a quarter larger.
    """
    step = 1 << max(0, (len(images) - 1).bit_length() - 3)
    padding = images.new_zeros(-len(images) % step, *images.shape[1:])
    return function(torch.cat([images, padding]))[: len(images)]


def load_served(location: str | Path, device: torch.device | None = None, *, attacks: bool = False) -> Served:
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
        return Storage(location).read(bundles.MANIFEST)
    except StorageError:
        return None


def _load(location: str | Path, device: torch.device | None, attacks: bool) -> Served:
    with Storage(location).download("") as folder:
        private = bundles.load_private(folder)
        bundles.verify(folder)
        whole = (folder / bundles.MANIFEST).read_bytes()
        public = (folder / "public" / bundles.MANIFEST).read_bytes()
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
            material = AttackMaterial(bundles.load_public(folder), networks)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = folded(private.classifier, private.sample[:8].float() / 255)
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    private = replace(private, classifier=classifier)  # what is checked, now and later, is what answers
    problem = private.problem()
    if problem is not None:
        raise BundleError(f"bundle {str(location)!r} fails its self-check: {problem}")
    channels, height, width = private.sample.shape[1:]
    return Served(
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


Job = tuple[Served, Tensor]
"""A request: the bundle that answers it, and protected images uint8 (N, C, H, W)."""


@torch.inference_mode()
def classify(jobs: list[Job]) -> list[tuple[Tensor, Tensor]]:
    """Classes and what looks protected, of the images of several requests at once."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, (served, _) in enumerate(jobs):
        groups[id(served)].append(i)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for places in groups.values():
        served = jobs[places[0]][0]
        images = torch.cat([jobs[i][1] for i in places]) if len(places) > 1 else jobs[places[0]][1]
        guard = served.guard
        protected = guard.looks_protected(images) if guard is not None else torch.ones(len(images), dtype=torch.bool)
        probabilities = served.probabilities(images)
        sizes = [len(jobs[i][1]) for i in places]
        parts = zip(probabilities.split(sizes), protected.split(sizes), strict=True)
        found |= dict(zip(places, parts, strict=True))
    return [found[i] for i in range(len(jobs))]


# What is live


def is_shelf(location: str | Path) -> bool:
    """Whether a folder is a shelf, not a bundle."""
    return Storage(location).exists(LIVE)


@dataclass(frozen=True)
class Named:
    """The bundle that a location names."""

    location: str
    version: str
    published: str | None
    """When it was made live, of a shelf."""


def current(location: str | Path) -> Named:
    """Which bundle a location names.

    Args:
        location: a bundle, or a shelf.

    Raises:
        StorageError: neither is there, or it cannot be read.
    """
    storage = Storage(location)
    if storage.local:  # through links such as runs/latest, so that all files are read of the same run
        storage = Storage(storage.path.resolve())
    if storage.exists(LIVE):
        named = _named(storage)
        version = named["version"]
        if version is None:
            raise StorageError(f"{storage.uri}/{LIVE} is damaged; raypp publish writes it anew")
        return Named(storage.folder(f"versions/{version}").uri, version, named["published"])
    if not storage.exists(bundles.MANIFEST):
        if storage.exists(f"bundle/{bundles.MANIFEST}"):
            raise StorageError(f"{storage.uri} is a run; its bundle is {storage.folder('bundle').uri}")
        raise StorageError(f"{storage.uri} is neither a bundle nor a shelf of published ones")
    return Named(storage.uri, hashlib.sha256(storage.read(bundles.MANIFEST)).hexdigest()[:16], None)


def _previous(location: str | Path) -> str | None:
    """Where the bundle lies that was live on a shelf before the one that is named now."""
    storage = Storage(location)
    try:
        version = _named(storage)["previous"] if storage.exists(LIVE) else None
    except RayppError:
        return None
    return storage.folder(f"versions/{version}").uri if version else None


def _named(storage: Storage) -> dict[str, str | None]:
    """The versions that a shelf names: what is live, since when, and what was before; all None where its file is
    damaged."""
    try:
        found = json.loads(storage.read(LIVE))
        return {
            "version": str(found["version"]),
            "previous": found.get("previous"),
            "published": found.get("published"),
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"version": None, "previous": None, "published": None}


class Live:
    """The bundle that is live at a location, and those before it.

    Args:
        location: a bundle or a shelf.
        prepare: what else a service makes of a bundle before it takes over; see :meth:`prepared`.

    Raises:
        RayppError: there is none that works; later ones that do not are refused and the old one stays.
    """

    def __init__(
        self,
        location: str | Path,
        device: torch.device | None = None,
        prepare: Callable[[Served], Any] | None = None,
    ) -> None:
        self.location, self.device, self.prepare = location, device, prepare
        self.rejected: dict[str, str] | None = None
        self.looked = 0.0  # when, in monotonic seconds
        self._refused: tuple[Named, float] | None = None  # and until when it is not tried again
        self._lock = threading.Lock()
        self._prepared: dict[str, Any] = {}
        named = current(location)
        try:
            self._kept: list[Served] = [self._load(named.location)]
        except Exception as error:  # whatever a damaged bundle makes its loader raise
            before = _previous(location)
            if before is None:
                raise
            self._kept = [self._load(before)]  # a replica that starts while a bad bundle is named serves the one before
            self._refuse(named, error)

    def _load(self, where: str) -> Served:
        served = load_served(where, self.device, attacks=self.prepare is not None)
        if self.prepare is not None:
            self._prepared[served.version] = self.prepare(served)
        return served

    def _refuse(self, named: Named, error: Exception) -> None:
        # A store may be away for a moment, and a bundle may be on its way.
        wait = 0.0 if isinstance(error, OSError | StorageError) else RETRY_SECONDS
        self._refused = named, time.monotonic() + wait
        self.rejected = {"version": named.version, "reason": _reason(error)}
        if named.published is not None:
            self.rejected["published"] = named.published

    def prepared(self, served: Served) -> Any:
        """What ``prepare`` made of a bundle; None if it has just been dropped."""
        return self._prepared.get(served.version)

    @property
    def now(self) -> Served:
        return self._kept[-1]

    def refresh(self) -> bool:
        """Look whether another bundle has become live and take it over; blocks while that is loaded. Whether it was."""
        with self._lock:
            self.looked = time.monotonic()
            try:
                named = current(self.location)
            except Exception as error:  # a store that is away for a moment takes nothing down, whatever it raises
                self.rejected = {"version": "unknown", "reason": _reason(error)}
                return False
            if named.version == self.now.version:
                self.rejected = self._refused = None
                return False
            if self._refused is not None and self._refused[0] == named and time.monotonic() < self._refused[1]:
                return False
            try:
                found = next((s for s in self._kept if s.version == named.version), None)
                served = found or self._load(named.location)
            except Exception as error:  # whatever a damaged bundle makes its loader raise: the old one stays
                self._refuse(named, error)
                return False
            self.rejected = self._refused = None
            # One list takes the other's place: who looks at the same time sees the old or the new one, whole.
            self._kept = ([s for s in self._kept if s is not served] + [served])[-NUM_KEPT:]
            kept = {s.version for s in self._kept}
            self._prepared = {version: made for version, made in self._prepared.items() if version in kept}
            return True

    def of(self, protection: str | None) -> Served | None:
        """The newest bundle in memory with this protection, the live one for None."""
        if protection is None:
            return self.now
        return next((s for s in reversed(self._kept) if s.protection == protection), None)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, RayppError) else f"{type(error).__name__} while it was loaded"


@dataclass(frozen=True)
class Published:
    version: str
    location: str
    previous: str | None
    published: str
    """When."""


@contextmanager
def publishing(
    bundle: str | Path, shelf: str | Path, check: Callable[[Served], Any] | None = None
) -> Iterator[Published]:
    """Check a bundle, put it on a shelf and make it live; if the body raises, what was live before is so again.

    Args:
        check: what else a service makes of a bundle before it takes over, tried here first.

    Raises:
        RayppError: the bundle does not work, and nothing has changed; or the shelf cannot be written.
    """
    served = load_served(bundle, attacks=check is not None)
    if check is not None:
        try:
            check(served)
        except Exception as error:  # whatever damaged attacks make their loader raise
            raise BundleError(f"the attacks of bundle {str(bundle)!r} do not load: {_reason(error)}") from error
    storage = Storage(shelf)
    if storage.exists(bundles.MANIFEST):
        raise BundleError(f"{storage.uri} is a bundle itself; allowed is a new or empty folder, or a shelf")
    version = served.version
    place = storage.folder(f"versions/{version}")
    if not place.exists(bundles.MANIFEST):
        with Storage(bundle).download("") as folder:
            storage.upload(folder, f"versions/{version}", last=bundles.MANIFEST)
    if load_served(place.uri).version != version:  # what was uploaded, not what was meant to be
        raise BundleError(f"{place.uri} is not the bundle that was published; remove that folder")
    before = storage.read(LIVE) if storage.exists(LIVE) else None
    named = _named(storage) if before else {"version": None, "previous": None}
    # Of a bundle that is live already, the one before it stays the one to go back to.
    previous = named["previous"] if named["version"] == version else named["version"]
    now = {"version": version, "previous": previous, "published": datetime.now(UTC).isoformat(timespec="seconds")}
    written = (json.dumps(now) + "\n").encode()
    storage.write(LIVE, written)
    try:
        yield Published(version, place.uri, previous, str(now["published"]))
    except BaseException:
        if storage.read(LIVE) == written:  # else somebody has published since, and this is not ours to undo
            if before is not None:
                storage.write(LIVE, before)
            else:
                storage.remove(LIVE)
        raise
