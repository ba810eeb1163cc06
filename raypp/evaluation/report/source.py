"""Scorecards and pictures that a report reads."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypp.bundle.locate import locate_bundle, split_choice
from raypp.utils.errors import BundleError, ConfigError
from raypp.utils.storage import Storage

REQUIRED_KEYS = {"attacks", "baselines", "strongest_attack", "strongest_reconstruction", "label", "bits_identified"}


@dataclass(frozen=True)
class Source:
    """One scorecard with its pictures and scores."""

    card: dict[str, Any]
    scores: dict[str, dict[str, np.ndarray]]
    """Values of each metric, one per image, by attack; baselines are named ``baseline: ...``."""
    pictures: dict[str, np.ndarray]

    @property
    def finished_attacks(self) -> dict[str, dict[str, Any]]:
        return {name: attack for name, attack in self.card["attacks"].items() if attack["status"] == "done"}


def distinct_labels(sources: Sequence[Source]) -> list[str]:
    """The label of each scorecard; those of equal labels also name the run of the bundle."""
    labels = [str(source.card["label"]) for source in sources]
    names = [_run_name(str(source.card["target"])) for source in sources]
    return [f"{label}, {name}" if labels.count(label) > 1 else label for label, name in zip(labels, names, strict=True)]


def _run_name(location: str) -> str:
    return location.rstrip("/").removesuffix("/bundle").rpartition("/")[2]


def read_source(location: str) -> Source:
    """Read a scorecard with its files from an attack run, or from a bundle; raises ConfigError if there is none.

    Args:
        location: an attack run, or a location of a bundle (:func:`raypp.bundle.locate.locate_bundle`).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folders = [Storage(split_choice(location)[0])]
    with contextlib.suppress(BundleError):
        folders.append(Storage(locate_bundle(location)).folder("private"))
    for folder in folders:
        if not folder.exists("scorecard.json"):
            continue
        try:
            card = json.loads(folder.read("scorecard.json"))
            pictures = load(folder.read("examples.safetensors"))
            scores = _parse_scores(folder.read("scores.csv").decode())
            if missing := REQUIRED_KEYS - set(card):
                raise ValueError(f"scorecard.json lacks {', '.join(sorted(missing))}")
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise BundleError(f"the scorecard in {folder.uri} cannot be read: {error}") from error
        return Source(card, scores, pictures)
    raise ConfigError(f"{location!r} holds no scorecard; `raypp attack` makes one")


def _parse_scores(text: str) -> dict[str, dict[str, np.ndarray]]:
    scores: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        metrics = scores.setdefault(row["attack"], {})
        for name, value in row.items():
            if name not in {"attack", "image", "label"} and value:
                metrics.setdefault(name, []).append(float(value))
    return {attack: {name: np.array(values) for name, values in metrics.items()} for attack, metrics in scores.items()}
