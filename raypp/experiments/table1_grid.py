"""Table I: rows, cells of the grid, and plain classifiers of matching size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from raypp.config.overrides import Settings, deep_merge, flatten_dict, parse_overrides
from raypp.config.presets import load_tree
from raypp.config.schema import Config
from raypp.config.validation import check_milestones, validate
from raypp.utils.documents import load_yaml
from raypp.utils.errors import ConfigError
from raypp.utils.registry import suggest
from raypp.utils.storage import Storage

CELLS = "cells"
MAX_WIDTH = 1024  # of the plain classifier that matches the number of parameters of the proposed method
COMPARED = ("data.", "protection.", "classifier.", "features.", "train.")
"""Settings that are compared with the paper's."""
NOT_COMPARED = ("data.source.root", "features.fallback", "train.alpha", "train.eval_batch_size")
"""Exceptions: rows differ in alpha, and a run warns of a fallback that it uses."""
GRID_KEYS = {
    "protection.name": "--methods",
    "train.alpha": "--methods",
    "seed": "--seeds",
    "cluster.storage": "--storage",
}
"""Settings that the grid sets, and the options that control them."""


@dataclass(frozen=True)
class TableRow:
    """A row of ``table1.yaml``, which documents the fields."""

    name: str
    label: str
    settings: dict[str, Any]
    keep: Sequence[str] = ()
    match_parameters: bool = False
    paper: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class GridCell:
    """One run of the grid."""

    dataset: str
    method: TableRow
    seed: int
    config: Config
    base: Config
    """The data set's preset with the command's settings, before the row's own."""

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.method.name}-seed{self.seed}"


def table_rows() -> dict[str, TableRow]:
    """All rows of the table, by name."""
    text = (resources.files("raypp.experiments") / "table1.yaml").read_text(encoding="utf-8")
    return {row["name"]: TableRow(**row) for row in load_yaml(text)}


def grid_cells(
    datasets: Sequence[str], methods: Sequence[str], seeds: Sequence[int], flags: Settings, storage: Storage
) -> list[GridCell]:
    """The grid: every data set with every method and seed.

    Args:
        datasets: names of presets, or paths of YAML files.
        methods: names of rows.
        flags: settings that override every preset, such as ``("train.epochs=3",)``.
        storage: the table's folder.

    Raises:
        ConfigError: an unknown or repeated data set, method or seed, or an invalid setting.
    """
    rows = table_rows()
    for name in methods:
        if name not in rows:
            raise ConfigError(f"unknown method {name!r}{suggest(name, rows)}; allowed: {', '.join(rows)}")
    for axis, values in (("dataset", [Path(d).stem for d in datasets]), ("method", methods), ("seed", seeds)):
        repeated = {str(value) for value in values if list(values).count(value) > 1}
        if repeated:
            raise ConfigError(f"{axis} {', '.join(sorted(repeated))} is given twice")
        if not values:
            raise ConfigError(f"no {axis} is given; allowed is one or more")
    overrides = flatten_dict(parse_overrides(flags))
    for key, option in GRID_KEYS.items():
        if key in overrides or (key == "protection.name" and isinstance(overrides.get("protection"), str)):
            raise ConfigError(f"--{key} is set by the table's grid; choose by {option}")
    grid = []
    for dataset in datasets:
        tree = load_tree(dataset, flags=flags)
        base = validate(tree)
        for name in methods:
            for seed in seeds:
                config = _configure(tree, rows[name], seed, storage)
                grid.append(GridCell(Path(dataset).stem, rows[name], seed, config, base))
    return grid


def _configure(base: dict[str, Any], method: TableRow, seed: int, storage: Storage) -> Config:
    settings = method.settings
    if method.keep:
        protection = {key: base["protection"][key] for key in method.keep if key in base["protection"]}
        settings = deep_merge(settings, {"protection": protection})
    tree = deep_merge(deep_merge(base, settings), {"seed": seed, "cluster": {"storage": storage.folder(CELLS).uri}})
    config = validate(tree)
    check_milestones(config.train, "train")
    if (config.cluster.num_workers or 1) > 1:
        raise ConfigError(
            f"cluster.num_workers is {config.cluster.num_workers}, allowed for table1 is 1: its cells run side by side"
        )
    if method.match_parameters:
        config = validate(deep_merge(tree, {"classifier": {"width": _matching_width(validate(base))}}))
    return config


def num_parameters(config: Config, num_classes: int = 10, image_size: tuple[int, int] = (32, 32)) -> int:
    """Parameters of a configuration's protection and classifier."""
    import torch

    from raypp.models.adaptation import build_classifier
    from raypp.protections import PROTECTIONS

    channels = config.data.channels
    with torch.device("meta"):
        sizes: Any = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
        modules = [build_classifier(config.classifier, config.adaptation_name, **sizes)]
        if PROTECTIONS.get(config.protection.name).trained:
            modules.append(PROTECTIONS.build(config.protection, channels=channels))
    return sum(p.numel() for module in modules for p in module.parameters())


def _matching_width(config: Config) -> int:
    """The width at which a plain classifier has about as many parameters as ``config`` has in all."""
    if "width" not in type(config.classifier).model_fields:
        raise ConfigError(f"method plain-matched needs a classifier with a width; {config.classifier.name} has none")
    target = num_parameters(config)
    plain = validate(deep_merge(config.model_dump(mode="json"), {"protection": "plain", "train": {"mode": "plain"}}))

    def excess(width: int) -> int:
        options = plain.classifier.model_copy(update={"width": width})
        return num_parameters(plain.model_copy(update={"classifier": options})) - target

    widths = range(1, MAX_WIDTH)
    first = bisect_left(widths, 0, key=excess)  # the number of parameters grows with the width
    return min(widths[max(first - 1, 0) : first + 1], key=lambda width: abs(excess(width)))


def paper_name(dataset: str) -> str | None:
    """The paper's experiment with this data set, by the longest common prefix; None if there is none."""
    return next((name for name in ("cifar100", "cifar10") if dataset.startswith(name)), None)
