"""Write a bundle, and add attack networks and scorecards to it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from raypp.bundle.guard import PlainImageDetector
from raypp.bundle.manifest import LEAKAGE, MANIFEST, _json, local_folder, write_manifest
from raypp.bundle.model_card import NOT_ATTACKED, leakage_card, model_card
from raypp.config.schema import Config
from raypp.models.perceptual import StateDict
from raypp.utils.errors import BundleError
from raypp.utils.keys import FILE, Key
from raypp.utils.storage import Storage


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
    guard: PlainImageDetector | None,
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
    with local_folder(location, "private") as (_, whole):
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


def _contiguous(state: StateDict) -> dict[str, Tensor]:
    """safetensors stores plain contiguous tensors; channels-last weights are laid out anew."""
    return {k: v.detach().cpu().contiguous(memory_format=torch.contiguous_format) for k, v in state.items()}
