"""A training checkpoint as a folder: ``state.pt``, ``history.json``, and ``checkpoint.json`` with their SHA-256."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raypp.utils.errors import TrainingError
from raypp.utils.storage import sha256

FILES = ("state.pt", "history.json")


def save(folder: Path, state: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Write a checkpoint into an empty folder; ``state`` holds tensors, numbers, strings and containers of them."""
    torch.save(state, folder / "state.pt")
    (folder / "history.json").write_text(json.dumps(history))
    sums = {name: sha256(folder / name) for name in FILES}
    (folder / "checkpoint.json").write_text(json.dumps({"schema": 1, "sha256": sums}))


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read and verify a checkpoint.

    Raises:
        TrainingError: a file is missing or its content is not what was written.
    """
    try:
        sums = json.loads((folder / "checkpoint.json").read_text())["sha256"]
        for name in FILES:
            if sha256(folder / name) != sums[name]:
                raise TrainingError(f"checkpoint {folder.name} is damaged: {name} does not match its SHA-256")
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        return state, json.loads((folder / "history.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"checkpoint {folder.name} is damaged: {type(error).__name__}: {error}") from error
