"""The exported artefact: ``public/`` is what clients may have, ``private/`` stays with the classifier's owner.

Both parts carry a manifest with the SHA-256 of every file in them; ``public/`` alone is enough to protect images.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

import raypp
from raypp.bundle.guard import Guard, restore
from raypp.config import Config, read_yaml
from raypp.metrics import chance_error
from raypp.models import CLASSIFIERS
from raypp.models.adaptation import build_classifier
from raypp.models.perceptual import StateDict
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.utils.errors import BundleError, ConfigError, StorageError, first_line
from raypp.utils.keys import FILE, Key
from raypp.utils.storage import Storage, sha256

SCHEMA = 1
MANIFEST = "manifest.json"
NOT_ATTACKED = "No attack has been run on this bundle yet."
LEAKAGE = "## What attacks recovered"
PRIVATE = ("classifier.json", "classifier.safetensors", "sample.safetensors", "metrics.json", "config.yaml")
"""Files that every private part has."""
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
    guard: Guard | None
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


def export(
    target: Storage,
    name: str,
    *,
    config: Config,
    protection: StateDict,
    classifier: StateDict,
    plain_classifier: StateDict | None,
    classes: tuple[str, ...],
    image_size: tuple[int, int],
    key: Key | None,
    guard: Guard | None,
    sample: tuple[Tensor, Tensor],
    metrics: dict[str, Any],
    environment: dict[str, Any],
) -> None:
    """Write a bundle to the folder ``name`` in ``target``, complete or not at all.

    Args:
        guard: refuses what does not look protected, where it could be calibrated.
        sample: protected images uint8 (n, C, H, W) and the classes int64 (n,) that the classifier gives them: by them
            whoever loads the bundle checks that it works.

    Raises:
        StorageError: the target cannot be written.
    """
    about = {
        # Where the owner's key file lies is nobody else's business.
        "protection": config.protection.model_dump(mode="json", exclude={"key_file"}),
        "channels": config.data.channels,
        "image_size": list(image_size),
        "key": key.identifier if key is not None else None,
    }
    private_about = {
        "classifier": config.classifier.model_dump(mode="json"),
        "adaptation": config.adaptation_name,
        "classes": list(classes),
        "channels": config.data.channels,
        "image_size": list(image_size),
    }
    private = {
        "classifier.json": _json(private_about),
        "classifier.safetensors": save(_contiguous(classifier)),
        "sample.safetensors": save(_contiguous({"images": sample[0], "classes": sample[1]})),
        "config.yaml": config.to_yaml().encode(),
        "metrics.json": _json(metrics),
        "environment.json": _json(environment),
    }
    if guard is not None:
        private["guard.json"] = _json(guard.dump())
    if plain_classifier is not None:
        private["plain_classifier.safetensors"] = save(_contiguous(plain_classifier))
    parts = {
        "public": {"protection.json": _json(about), "protection.safetensors": save(_contiguous(protection))},
        "private": private,
        "": {"MODEL_CARD.md": model_card(config, classes, image_size, guard, metrics, environment).encode()},
    }
    with tempfile.TemporaryDirectory(prefix="raypp-bundle-") as scratch:
        root = Path(scratch) / "bundle"  # the scratch folder itself is closed to other users
        root.mkdir()
        for part, files in parts.items():
            folder = root / part
            folder.mkdir(mode=0o700 if part == "private" else 0o755, exist_ok=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
        if key is not None:
            key.write(root / "private" / FILE)
        for part in ("public", "private", ""):  # the whole's manifest comes last and covers the parts' manifests
            write_manifest(root / part)
        target.upload(root, name, last=MANIFEST)


def add_attacks(
    location: str | Path,
    networks: dict[str, tuple[dict[str, Any], StateDict]],
    scorecard: dict[str, Any],
    files: dict[str, bytes],
) -> None:
    """Put attack networks and what attacks recovered into a bundle's private part, and the verdict on its card.

    Args:
        networks: options and weights by the attacks' names; they take the place of earlier ones.
        files: what else belongs to the scorecard, by name.

    Raises:
        BundleError: the bundle is missing or altered.
        StorageError: it cannot be written.
    """
    storage = Storage(location)
    with _folder(location, "private") as (_, whole):
        if not whole:
            raise BundleError(f"{str(location)!r} is only a part of a bundle")
    with storage.download("") as folder, tempfile.TemporaryDirectory(prefix="raypp-bundle-") as scratch:
        root = Path(scratch) / "bundle"
        shutil.copytree(folder, root)
        attacks = root / "private" / "attacks"
        attacks.mkdir(exist_ok=True)
        for name, (options, state) in networks.items():
            (attacks / f"{name}.json").write_bytes(_json(options))
            (attacks / f"{name}.safetensors").write_bytes(save(_contiguous(state)))
        for name, data in {"scorecard.json": _json(scorecard), **files}.items():
            (root / "private" / name).write_bytes(data)
        card = root / "MODEL_CARD.md"
        kept = card.read_text().replace(NOT_ATTACKED, "What attacks recovered is below.").partition(LEAKAGE)[0]
        card.write_text(kept.rstrip() + "\n\n" + leakage_card(scorecard))
        for part in ("private", ""):  # the public part is told by its manifest, which clients pin
            write_manifest(root / part)
        parent, _, name = storage.uri.rstrip("/").rpartition("/")
        Storage(parent or "/").upload(root, name, last=MANIFEST)


def leakage_card(scorecard: dict[str, Any]) -> str:
    """What attacks recovered, as a section of the card."""
    verdict, reason = scorecard["verdict"], scorecard["verdict_reason"]
    lines = [
        LEAKAGE,
        "",
        f"Verdict: **{verdict or 'not measured'}**{f' ({reason})' if reason else ''}.",
        "",
        f"{scorecard['num_queries']:,} test images attacked, looked for among {scorecard['num_gallery']:,}.",
        "",
        "| attack | threat | originals found | SSIM | verdict |",
        "|---|---|---|---|---|",
    ]
    for name, attack in scorecard["attacks"].items():
        if attack["status"] != "done":
            lines.append(f"| {name} | {attack['threat']} | - | - | {attack['status']} |")
            continue
        scores, bound = attack["scores"], " (at least)" if attack["lower_bound"] else ""
        lines.append(
            f"| {name} | {attack['threat']} | {attack['found']:.1%}{bound} | {scores['ssim']['mean']:.3f} | "
            f"{attack['verdict']} |"
        )
    null = scorecard["nulls"].get("class mean") or scorecard["nulls"]["mean image"]
    lines += [
        "",
        f"Who never saw the protected image and knows at most the class gets SSIM {null['ssim']['mean']:.3f} and finds "
        f"{max(null[key]['mean'] for key in ('reidentified', 'reidentified_edges')):.2%}.",
        "",
    ]
    return "\n".join(lines)


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json`` over every other file below ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    manifest = {
        "schema": SCHEMA,
        "raypp": raypp.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    (folder / MANIFEST).write_bytes(_json(manifest))


def verify(folder: Path) -> dict[str, Any]:
    """Check every file that ``folder/manifest.json`` lists and return the manifest.

    Raises:
        BundleError: no manifest, a newer schema, or a missing, altered or unlisted file, by name.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        schema, files = int(manifest["schema"]), dict(manifest["files"])
        sums = {str(name): str(entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise BundleError(f"{str(folder)!r} is no bundle: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{str(folder / MANIFEST)!r} cannot be read: {error!r}") from error
    if schema > SCHEMA:
        raise BundleError(
            f"{str(folder)!r} has bundle schema {schema}, raypp {raypp.__version__} reads up to {SCHEMA}; upgrade raypp"
        )
    for name, expected in sums.items():
        path = folder / name
        try:
            inside = path.resolve().is_relative_to(folder.resolve())
        except (OSError, RuntimeError, ValueError):  # a name too long, a link to itself, a zero byte
            inside = False
        if not inside:
            raise BundleError(f"{str(folder)!r} lists {name!r}, a file outside of it")
        if not path.is_file():
            raise BundleError(f"{str(folder)!r} is incomplete: {name} is missing")
        if sha256(path) != expected:
            raise BundleError(f"{str(folder)!r} was altered: {name} does not match its SHA-256")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and name not in sums:
            raise BundleError(f"{str(folder)!r} was altered: {name} is not listed in its manifest")
    return dict(manifest)


def load_public(location: str | Path, key: Key | None = None) -> PublicBundle:
    """Load and verify the public part of a bundle, given the bundle or its ``public`` folder (path or URI).

    Args:
        key: the key of a keyed protection; not needed beside the private part, which holds it.

    Raises:
        BundleError: the bundle is missing, altered or incomplete, or ``key`` is missing, another one or not needed.
        ConfigError: the private part's key file is damaged.
    """
    with _folder(location, "public") as (folder, whole):
        given = key is not None
        beside = folder.parent / "private" / FILE
        if key is None and whole and beside.is_file():
            key = Key.read(beside)
        manifest = verify(folder)
        _listed(manifest, folder, "protection.json", "protection.safetensors")
        about = _read_json(folder / "protection.json")
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
    with _folder(location, "private") as (folder, _):
        manifest = verify(folder)
        _listed(manifest, folder, *PRIVATE)
        about = _read_json(folder / "classifier.json")
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
            guard = restore(_read_json(found)) if found.is_file() else None
        except (ConfigError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise BundleError(f"the classifier in {str(location)!r} cannot be built: {first_line(error)}") from error
        try:
            config = read_yaml(folder / "config.yaml")
        except ConfigError as error:
            raise BundleError(str(error)) from error
        metrics = _read_json(folder / "metrics.json")
    net.eval().requires_grad_(False)
    return PrivateBundle(net, classes, config, metrics, guard, images, made)


def load_plain_classifier(location: str | Path) -> nn.Module | None:
    """The classifier that a bundle's run trained on plain images first, or None where it trained none."""
    with _folder(location, "private") as (folder, _):
        file = folder / "plain_classifier.safetensors"
        if not file.is_file():
            return None
        verify(folder)
        about = _read_json(folder / "classifier.json")
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


def model_card(
    config: Config,
    classes: tuple[str, ...],
    image_size: tuple[int, int],
    guard: Guard | None,
    metrics: dict[str, Any],
    environment: dict[str, Any],
) -> str:
    """The card as Markdown: what this is, what was measured, and what it does not promise."""
    test = metrics["test"]
    low, high = test["accuracy_interval"]
    error = chance_error(test, len(classes))
    similarity = test["ssim"]["mean"] if test["ssim"] else None
    lines = [
        f"# Model card: {config.protection.name} protection with {config.classifier.name}",
        "",
        f"Made by raypp {raypp.__version__} on {datetime.now(UTC).date()}.",
        "",
        *([f'<p style="color: red"><strong>Error: {error}.</strong></p>', ""] if error else []),
        "| | |",
        "|---|---|",
        f"| task | {len(classes)} classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''} |",
        f"| images | {image_size[0]} x {image_size[1]}, {config.data.channels} channels, 8 bit |",
        f"| training data | source `{config.data.source.name}`, {metrics['num_train']:,} images |",
        f"| mode | {config.train.mode}, alpha {config.train.alpha}, {config.train.epochs} epochs, seed {config.seed} |",
        f"| feature network | {metrics['features']} |",
        f"| test accuracy after 8-bit rounding | {test['accuracy']:.2%} "
        f"(95% interval {low:.2%} to {high:.2%}, n = {test['num_images']:,}) |",
        f"| test accuracy without rounding | {test['accuracy_float']:.2%} |",
    ]
    if metrics.get("plain_test"):
        lines.append(f"| plain classifier, same data | {metrics['plain_test']['accuracy']:.2%} |")
    if similarity is not None:
        lines.append(f"| SSIM of protected to plain images | {similarity:.3f} on average |")
    bits = PROTECTIONS.get(config.protection.name).bits(config.protection)
    if bits is not None:
        lines.append(f"| what leaves the client of an image | {bits:.4g} bits at most |")
    if PROTECTIONS.get(config.protection.name).classifies(config.protection):
        lines.append("| who can tell its class | whoever sees the protected image: the public part classifies |")
    if guard is not None:
        lines.append(f"| plain images that the service refuses | {_share(guard.plain_refused)} |")
        lines.append(f"| protected images that it refuses by mistake | {_share(guard.protected_refused)} |")
    lines += [f"| hardware | {environment['hardware']} |", "", "## What this does not promise", ""]
    keyed = PROTECTIONS.get(config.protection.name).needs_key(config.protection)
    who = "whoever has the key, which every client has," if keyed else "whoever has the public part of this bundle"
    lines += [
        "A low SSIM between protected and plain images does not even say that a person sees nothing: look at the",
        "picture. It says **nothing** about an attacker who trains an inverse network on pairs of plain and protected",
        f"images, which {who} can make. {NOT_ATTACKED}",
    ]
    if not PROTECTIONS.get(config.protection.name).trained and config.protection.name != "plain":
        lines += ["", "This scheme is here to be compared with. Published attacks undo it; do not rely on it."]
    lines += [
        "",
        "Whoever re-encodes protected images (JPEG) or changes their size may destroy the classification:",
        "`raypp evaluate BUNDLE --jpeg 75` measures it.",
        "",
    ]
    if metrics.get("warnings"):
        lines += ["## Departures", "", *(f"- {w}" for w in metrics["warnings"]), ""]
    return "\n".join(lines)


def _share(rate: dict[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['share']:.2%} (95% interval {low:.2%} to {high:.2%}, n = {rate['num']:,})"


def _same_key(key: Key | None, identifier: str, location: str | Path) -> None:
    if key is None:
        raise BundleError(
            f"the protection in {str(location)!r} needs its key {identifier}: --key FILE; its owner has it as "
            f"private/{FILE}"
        )
    if key.identifier != identifier:
        raise BundleError(f"the key {key.identifier} is not that of {str(location)!r}, which is {identifier}")


@contextmanager
def _folder(location: str | Path, part: str) -> Iterator[tuple[Path, bool]]:
    """Give the local folder of one part of a bundle, and whether the rest stands beside it.

    Of a whole bundle every file is verified first: so nobody can put the public part of one beside the private part of
    another.
    """
    try:
        storage = Storage(location)
        if not storage.exists():
            raise BundleError(f"bundle {str(location)!r} does not exist")
        whole = storage.exists(f"{part}/{MANIFEST}")
        with storage.download("") as folder:
            if whole:
                verify(folder)
            yield (folder / part if whole else folder), whole
    except StorageError as error:
        raise BundleError(f"bundle {str(location)!r} cannot be read: {error}") from error


def _listed(manifest: dict[str, Any], folder: Path, *names: str) -> None:
    """Refuse a part whose manifest does not vouch for a file that will be read."""
    for name in names:
        if name not in manifest["files"]:
            raise BundleError(f"{str(folder)!r} is incomplete: its manifest does not list {name}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{str(path)!r} holds no JSON object")
    return data


def _contiguous(state: StateDict) -> dict[str, Tensor]:
    """safetensors stores plain contiguous tensors; channels-last weights are laid out anew."""
    return {k: v.detach().cpu().contiguous(memory_format=torch.contiguous_format) for k, v in state.items()}


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
