"""Both services in the tests' own process, and what is sent to them."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raypp.bundle.load import load_private
from raypp.bundle.manifest import write_manifest
from raypp.experiments import attack_plan, attack_run
from raypp.serve.admission import AdmissionControl, Limits
from raypp.serve.attack_catalog import ServedAttack, load_attacks
from raypp.serve.auth import Tokens
from raypp.serve.loaded_model import LoadedModel, classify
from raypp.serve.model_store import ModelManager


def load_live(location: Path) -> ModelManager:
    return ModelManager(location, prepare=load_attacks)


class Here:
    """Both services in this process: what Ray's replicas do, without Ray.

    Args:
        bundle: its folder, or one that has been loaded already.
    """

    def __init__(self, bundle: Path | ModelManager, tokens: Tokens | None = None) -> None:
        self.live = copy.copy(bundle) if isinstance(bundle, ModelManager) else load_live(bundle)
        self.valid = tokens
        self.limits = Limits(body=200_000, images=16)
        self.waiting = AdmissionControl(20)
        self.seen: list[tuple[str, int, int]] = []

    async def tokens(self) -> Tokens | None:
        return self.valid

    def active_model(self) -> LoadedModel:
        return self.live.active

    def rejected(self) -> dict[str, str] | None:
        return self.live.rejected

    async def find_model(self, protection: str | None) -> LoadedModel | None:
        return self.live.get(protection)

    async def predict(self, model: LoadedModel, images: Tensor) -> tuple[Tensor, Tensor]:
        return classify([(model, images)])[0]

    async def reconstruct(self, attack: ServedAttack, images: Tensor) -> Tensor:
        return attack.run(images)

    def observe(self, route: str, status: int, num_images: int, seconds: float) -> None:
        self.seen.append((route, status, num_images))


def protected(bundle: Path, num: int = 4) -> np.ndarray:
    """Protected images of the bundle's own sample, uint8 (N, H, W, C)."""
    return load_private(bundle).sample[:num].permute(0, 2, 3, 1).numpy()


def npy(images: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, images)
    return file.getvalue()


NPY, PNG = {"Content-Type": "application/x-npy"}, {"Content-Type": "image/png"}


def attack_copy(bundle: Path, folder: Path, attacks: dict[str, Any]) -> Path:
    """Copy a bundle into a folder and run attacks on the copy, ten images each; returns the copy."""
    copied = shutil.copytree(bundle, folder / "bundle")
    suite = folder / "suite.yaml"
    suite.write_text(json.dumps({"num_queries": 10, "curve": False, "reference_epochs": 0, "attacks": attacks}))
    attack_run.run_attack_suite(
        attack_plan.make_attack_plan(bundle=str(copied), suite=str(suite), name="a", storage=folder), quiet=True
    )
    return copied


def break_classifier(bundle: Path) -> None:
    """Set the classifier's weights to zero and update the manifests."""
    path = bundle / "private" / "classifier.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(path).items()}, path)
    for part in ("private", ""):
        write_manifest(bundle / part)
