"""Table I: methods, cells of the grid, and networks of matching size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from raypp.config.overrides import deep_merge, flatten_dict, parse_overrides
from raypp.config.presets import load_tree, presets
from raypp.config.schema import Config
from raypp.config.validation import check_milestones, validate
from raypp.utils.documents import load_yaml
from raypp.utils.errors import ConfigError
from raypp.utils.registry import suggest
from raypp.utils.storage import Storage

CELLS = "cells"
MAX_WIDTH = 1024  # of a classifier that is to have as many parameters as the proposed
# What a departure from the paper may lie in; alpha is what rows differ in.
COMPARED = ("data.", "protection.", "classifier.", "features.", "train.")
# What came of features.fallback is among the runs' warnings.
NOT_COMPARED = ("data.source.root", "features.fallback", "train.alpha", "train.eval_batch_size")
GRID_KEYS = {
    "protection.name": "--methods",
    "train.alpha": "--methods",
    "seed": "--seeds",
    "cluster.storage": "--storage",
}
"""Settings that the grid itself makes, and the options that say how."""


@dataclass(frozen=True)
class TableRow:
    """A row of the table."""

    name: str
    label: str
    settings: dict[str, Any]
    keep: tuple[str, ...] = ()
    match_parameters: bool = False
    paper: dict[str, float] = field(default_factory=dict)


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
    """Every row that the table can have, by name."""
    text = (resources.files("raypp.experiments") / "table1.yaml").read_text(encoding="utf-8")
    return {row["name"]: TableRow(**(row | {"keep": tuple(row.get("keep", ()))})) for row in load_yaml(text)}


def grid_cells(
    datasets: Sequence[str], chosen: Sequence[str], seeds: Sequence[int], flags: Sequence[str], storage: Storage
) -> list[GridCell]:
    """The grid: every data set with every method and seed.

    Args:
        datasets: names of presets, or paths of YAML files.
        chosen: names of methods.
        flags: settings laid over every preset, such as ``("--train.epochs", "3")``.
        storage: the table's folder.

    Raises:
        ConfigError: an unknown data set or method, one named twice, or a setting that is not allowed.
    """
    known = table_rows()
    for name in chosen:
        if name not in known:
            raise ConfigError(f"unknown method {name!r}{suggest(name, known)}; allowed: {', '.join(known)}")
    for what, given in (("dataset", [Path(d).stem for d in datasets]), ("method", chosen), ("seed", seeds)):
        twice = {str(value) for value in given if list(given).count(value) > 1}
        if twice:
            raise ConfigError(f"{what} {', '.join(sorted(twice))} is given twice")
        if not given:
            raise ConfigError(f"no {what} is given; allowed is one or more")
    decided = flatten_dict(parse_overrides(flags))
    for key, option in GRID_KEYS.items():
        if key in decided or (key == "protection.name" and isinstance(decided.get("protection"), str)):
            raise ConfigError(f"--{key} is what the table's grid decides; choose by {option}")
    grid = []
    for dataset in datasets:
        base = load_tree(dataset, flags=tuple(flags))
        proposed = validate(base)
        for name in chosen:
            for seed in seeds:
                config = _configure(base, known[name], seed, storage)
                grid.append(GridCell(Path(dataset).stem, known[name], seed, config, proposed))
    return grid


def _configure(base: dict[str, Any], method: TableRow, seed: int, storage: Storage) -> Config:
    settings = method.settings
    if method.keep:
        kept = {key: base["protection"][key] for key in method.keep if key in base["protection"]}
        settings = deep_merge(settings, {"protection": kept})
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

    kind = PROTECTIONS.get(config.protection.name)
    with torch.device("meta"):
        parts = [
            build_classifier(
                config.classifier,
                config.adaptation_name,
                num_classes=num_classes,
                channels=config.data.channels,
                image_size=image_size,
            )
        ]
        if kind.trained:
            parts.append(PROTECTIONS.build(config.protection, channels=config.data.channels))
    return sum(p.numel() for part in parts for p in part.parameters())


def _matching_width(config: Config) -> int:
    """The classifier's width at which it alone has about as many parameters as ``config`` has in all."""
    if "width" not in type(config.classifier).model_fields:
        raise ConfigError(f"method plain-matched needs a classifier with a width; {config.classifier.name} has none")
    wanted = num_parameters(config)
    plain = validate(deep_merge(config.model_dump(mode="json"), {"protection": "plain", "train": {"mode": "plain"}}))

    def num_parameters_of(width: int) -> int:
        options = plain.classifier.model_copy(update={"width": width})
        return num_parameters(plain.model_copy(update={"classifier": options}))

    widths = range(1, MAX_WIDTH)  # the more channels the more parameters: halve the range
    at = bisect_left(widths, 0, key=lambda width: num_parameters_of(width) - wanted)
    return min(widths[max(at - 1, 0) : at + 1], key=lambda width: abs(num_parameters_of(width) - wanted))


def paper_name(dataset: str) -> str | None:
    """The paper's own experiment that a data set belongs to, by the longest common name; None if it is another."""
    return next((name for name in ("cifar100", "cifar10") if dataset.startswith(name) and name in presets()), None)
