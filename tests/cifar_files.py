"""Files in the layout of CIFAR's archives."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def noise(num: int, side: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any, num: int = 3) -> np.ndarray:
    """Write ``num`` images (a multiple of three) a file in torchvision's own layout, which it then expects."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    images = noise(num * (len(dataset.train_list) + 1), 32)
    fine = dataset.__name__ == "CIFAR100"

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    lists = []
    for i, (name, _) in enumerate([*dataset.train_list, *dataset.test_list]):
        flat = images[num * i : num * i + num].transpose(0, 3, 1, 2).reshape(3, -1)
        drawn = [2, 0, 1] * (num // 3)
        labels = {"fine_labels": drawn, "coarse_labels": [0] * num} if fine else {"labels": drawn}
        lists.append([name, write(name, {"data": flat, **labels})])
    meta = {**dataset.meta, "md5": write(dataset.meta["filename"], {dataset.meta["key"]: ["ant", "bee", "cow"]})}
    monkeypatch.setattr(dataset, "train_list", lists[:-1])
    monkeypatch.setattr(dataset, "test_list", lists[-1:])
    monkeypatch.setattr(dataset, "meta", meta)
    return images
