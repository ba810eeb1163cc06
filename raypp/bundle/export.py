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
from raypp.bundle.manifest import MANIFEST, local_folder, write_manifest
from raypp.bundle.model_card import LEAKAGE, NOT_ATTACKED, leakage_card, model_card
from raypp.config.schema import Config
from raypp.models.perceptual import StateDict
from raypp.utils.documents import dump_json
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
        guard: rejects plain images; None where it could not be calibrated.
        sample: protected images uint8 (n, C, H, W) and the classes int64 (n,) that the classifier gives them. They
            serve as a self-test when the bundle is loaded.

    Raises:
        StorageError: the target cannot be written.
    """
    shape = {"channels": config.data.channels, "image_size": list(image_size)}
    public_info = {
        "protection": config.protection.model_dump(mode="json", exclude={"key_file"}),  # the owner's path is private
        **shape,
        "key": key.identifier if key is not None else None,
    }
    private_info = {
        "classifier": config.classifier.model_dump(mode="json"),
        "adaptation": config.adaptation_name,
        "classes": list(classes),
        **shape,
    }
    private = {
        "classifier.json": dump_json(private_info),
        "classifier.safetensors": _save_tensors(classifier),
        "sample.safetensors": _save_tensors({"images": sample[0], "classes": sample[1]}),
        "config.yaml": config.to_yaml().encode(),
        "metrics.json": dump_json(metrics),
        "environment.json": dump_json(environment),
    }
    if guard is not None:
        private["guard.json"] = dump_json(guard.dump())
    if plain_classifier is not None:
        private["plain_classifier.safetensors"] = _save_tensors(plain_classifier)
    parts = {
        "public": {"protection.json": dump_json(public_info), "protection.safetensors": _save_tensors(protection)},
        "private": private,
        "": {"MODEL_CARD.md": model_card(config, classes, image_size, guard, metrics, environment).encode()},
    }
    _upload_parts(target, name, parts, key)


def _upload_parts(target: Storage, name: str, parts: dict[str, dict[str, bytes]], key: Key | None) -> None:
    """Write each part's files, the key and the manifests to a local folder, then upload it as ``name``."""
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
        for part in ("public", "private", ""):  # the bundle's manifest covers the parts' manifests, so it comes last
            write_manifest(root / part)
        target.upload(root, name, last=MANIFEST)


def add_attacks(
    location: str | Path,
    networks: dict[str, tuple[dict[str, Any], StateDict]],
    scorecard: dict[str, Any],
    files: dict[str, bytes],
) -> None:
    """Add attack networks and attack results to a bundle's private part, and the verdict to its model card.

    Args:
        networks: options and weights by attack name; they replace earlier ones.
        files: further files of the scorecard, by name.

    Raises:
        BundleError: the bundle is missing or altered.
        StorageError: the bundle cannot be written.
    """
    storage = Storage(location)
    with local_folder(location, "private") as (_, is_whole):
        if not is_whole:
            raise BundleError(f"{str(location)!r} is only a part of a bundle; give the whole bundle")
    with storage.download("") as folder, tempfile.TemporaryDirectory(prefix="raypp-bundle-") as scratch:
        root = Path(scratch) / "bundle"
        shutil.copytree(folder, root)
        attacks = root / "private" / "attacks"
        attacks.mkdir(exist_ok=True)
        for name, (options, state) in networks.items():
            (attacks / f"{name}.json").write_bytes(dump_json(options))
            (attacks / f"{name}.safetensors").write_bytes(_save_tensors(state))
        for name, data in {"scorecard.json": dump_json(scorecard), **files}.items():
            (root / "private" / name).write_bytes(data)
        card = root / "MODEL_CARD.md"
        head = card.read_text().replace(NOT_ATTACKED, "The attack results are below.").partition(LEAKAGE)[0]
        card.write_text(head.rstrip() + "\n\n" + leakage_card(scorecard))
        for part in ("private", ""):  # clients pin the public part's manifest, so it stays as it is
            write_manifest(root / part)
        storage.parent.upload(root, storage.name, last=MANIFEST)


def _save_tensors(state: StateDict) -> bytes:
    """Serialize to safetensors, which requires contiguous tensors; channels-last weights are copied."""
    return save({k: v.detach().cpu().contiguous(memory_format=torch.contiguous_format) for k, v in state.items()})
