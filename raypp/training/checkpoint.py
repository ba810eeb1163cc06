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
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of checkpoints, in the run's folder


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


def epochs_done(name: str) -> float:
    """Epochs of all phases before a checkpoint, from its name; 1.5 after half of the second epoch."""
    match = NAME_PATTERN.fullmatch(name)
    assert match is not None, name
    return int(match["epochs"]) + int(match["part"] or 0) / 10.0**PART_DIGITS


def list_checkpoints(run: Storage) -> list[str]:
    """Names of the checkpoints in a run's folder, newest first."""
    names = [name for name in run.folder(CHECKPOINTS).folders() if NAME_PATTERN.fullmatch(name)]
    return sorted(names, key=epochs_done, reverse=True)


def retention_score(history: list[EpochMetrics], name: str) -> float:
    """Rank a checkpoint so that the three highest scores contain the newest two checkpoints and the best epoch.

    An epoch with the lowest validation loss so far scores the number of such epochs. A phase begins with one, so losses
    of different phases are never compared. Checkpoints after it lie between its score and the one before, by their age.

    Args:
        history: all epochs before the checkpoint.
    """
    num_best = sum(bool(row["best"]) for row in history)
    position = epochs_done(name)
    if history and history[-1]["best"] and position == len(history):
        return float(num_best)
    return num_best - 1 / (position + 1)


def prune(run: Storage, written: str) -> None:
    """Delete all but the newest checkpoints; keep ``written`` even if a damaged one has a newer name."""
    others = [name for name in list_checkpoints(run) if name != written]
    if len(others) >= NUM_KEPT:
        run.remove(RAY_SNAPSHOT)  # Ray refuses a list with a checkpoint that is missing
    for name in others[NUM_KEPT - 1 :]:
        run.delete(f"{CHECKPOINTS}/{name}")
