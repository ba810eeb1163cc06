"""A training checkpoint as a folder: ``state.pt``, ``history.json``, and ``checkpoint.json`` with their SHA-256."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from raypp.utils.errors import TrainingError
from raypp.utils.storage import Storage, sha256

EpochMetrics = dict[str, Any]
FILES = ("state.pt", "history.json")
CHECKPOINTS = "checkpoints"
NAME_PATTERN = re.compile(r"epoch_(?P<epochs>\d+)(_part_(?P<part>\d+))?")
PART_DIGITS = 6
NUM_KEPT = 2  # the newest, and one more in case the newest turns out to be damaged


def save(folder: Path, state: dict[str, Any], history: list[EpochMetrics]) -> None:
    """Write a checkpoint into an empty folder; ``state`` holds tensors, numbers, strings and containers of them."""
    torch.save(state, folder / "state.pt")
    (folder / "history.json").write_text(json.dumps(history))
    digests = {name: sha256(folder / name) for name in FILES}
    (folder / "checkpoint.json").write_text(json.dumps({"schema": 1, "sha256": digests}))


def load(folder: Path) -> tuple[dict[str, Any], list[EpochMetrics]]:
    """Read and verify a checkpoint; return its state and history.

    Raises:
        TrainingError: a file is missing, or does not match its SHA-256.
    """
    try:
        digests = json.loads((folder / "checkpoint.json").read_text())["sha256"]
        for name in FILES:
            if sha256(folder / name) != digests[name]:
                raise TrainingError(f"checkpoint {folder.name} is damaged: {name} does not match its SHA-256")
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        return state, json.loads((folder / "history.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"checkpoint {folder.name} is damaged: {type(error).__name__}: {error}") from error


def to_json_lines(history: list[EpochMetrics]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in history).encode()


def checkpoint_name(epochs: int, part: float = 0.0) -> str:
    """Name a checkpoint by the epochs of all phases and the fraction of the next; steps depend on the workers."""
    return f"epoch_{epochs:04d}" + (f"_part_{round(part * 10**PART_DIGITS):0{PART_DIGITS}d}" if part else "")


def list_checkpoints(run: Storage) -> list[str]:
    """Names of the checkpoints in a run's folder, newest first."""
    matches = [NAME_PATTERN.fullmatch(name) for name in run.folder(CHECKPOINTS).folders()]
    positions = {match[0]: (int(match["epochs"]), int(match["part"] or 0)) for match in matches if match is not None}
    return sorted(positions, key=positions.__getitem__, reverse=True)


def prune(run: Storage, written: str) -> None:
    """Delete all but the newest checkpoints; keep ``written`` even if a damaged one has a newer name."""
    others = [name for name in list_checkpoints(run) if name != written]
    for name in others[NUM_KEPT - 1 :]:
        run.delete(f"{CHECKPOINTS}/{name}")
