"""Scorecards and pictures that a report reads."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raypp.utils.errors import BundleError, ConfigError
from raypp.utils.storage import Storage


@dataclass
class Source:
    """One scorecard with its pictures and scores."""

    card: dict[str, Any]
    scores: dict[str, dict[str, np.ndarray]]
    """Values of each metric, one per image, by attack (baselines are named ``null: ...``)."""
    pictures: dict[str, np.ndarray]
    figures: dict[str, str] = field(default_factory=dict)
    title: str = ""


def read_source(location: str) -> Source:
    """Read a scorecard and what belongs to it; raises ConfigError where there is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    storage = Storage(location)
    for folder in ("", "private", "bundle/private"):
        at = storage.folder(folder) if folder else storage
        if at.exists("scorecard.json"):
            try:
                card = json.loads(at.read("scorecard.json"))
                pictures = dict(load(at.read("examples.safetensors")))
                scores = read_scores(at.read("scores.csv").decode())
                if lacking := {"attacks", "baselines", "strongest_attack", "strongest_reconstruction", "label"} - set(
                    card
                ):
                    raise ValueError(f"scorecard.json lacks {', '.join(sorted(lacking))}")
            except (ValueError, KeyError, TypeError, SafetensorError) as error:
                raise BundleError(f"the scorecard in {at.uri} cannot be read: {error}") from error
            return Source(card, scores, pictures)
    raise ConfigError(f"{location!r} holds no scorecard; `raypp attack` makes one")


def read_scores(text: str) -> dict[str, dict[str, np.ndarray]]:
    rows = list(csv.DictReader(io.StringIO(text)))
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of = found.setdefault(row["attack"], {})
        for name, value in row.items():
            if name not in {"attack", "image", "label"} and value:
                of.setdefault(name, []).append(float(value))
    return {name: {key: np.array(values) for key, values in of.items()} for name, of in found.items()}
