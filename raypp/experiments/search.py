"""Hyperparameter search: its settings, its plan, its folder and the records of its trials.

NAME/search.yaml          settings of the search
NAME/trials/TRIAL/        per trial: a training run, leak/ with its quick attack, trial.json with its scores
NAME/trials.csv, .parquet every trial, rewritten when one ends
NAME/front.png, parallel.png, importance.png
NAME/best/                bundles of the best accuracy, the best privacy and the knee between them
NAME/attacks/, report/    the full attacks on them, and their report
NAME/search.json          written last
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from raypp.attacks import ATTACKS
from raypp.config.overrides import Settings, deep_merge, unflatten
from raypp.config.presets import Files, load_tree
from raypp.config.schema import Config, ConfigModel
from raypp.config.validation import check_milestones, format_validation_error, validate
from raypp.experiments.run_folder import lock, read_checked, refuse_changes, refuse_foreign, validate_name
from raypp.training.protection_task import check_features
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.storage import Storage

FILE, TRIALS, RESULT, SUMMARY = "search.yaml", "trials", "trial.json", "search.json"
MID_TRAINING = ("train.optimizer.lr",)
"""Settings that population based training may change while a trial runs. Other settings are part of the optimizer's
state, or change the loss by which epochs are compared."""
WORST_LEAKAGE = 1.0  # reported to the sampler for a trial that was stopped before its attack

Point = dict[str, Any]
"""Values of the searched settings, by dotted key."""
TrialRecord = dict[str, Any]
"""A trial's settings and scores; see :func:`raypp.experiments.search_trial.run_trial`."""


class Range(ConfigModel):
    """Numbers from ``low`` to ``high``; integers if both bounds are integers."""

    low: int | float
    high: int | float
    log: bool = False
    """Sample uniformly on a logarithmic scale."""

    @model_validator(mode="after")
    def _not_empty(self) -> Range:
        if not self.low < self.high:
            raise ValueError(
                f"low {self.low:g} and high {self.high:g} leave an empty range; low must be less than high"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; on a logarithmic scale it must be greater than 0")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


def _space(value: Any) -> Any:
    """Flatten nested sections to dotted keys; values are ranges (mappings with low and high) or lists of choices."""

    def walk(node: Any, key: str) -> Iterator[tuple[str, Any]]:
        if node is None or isinstance(node, Range):  # null removes a setting from the preset's space
            yield key, node
        elif isinstance(node, dict) and {"low", "high"} & set(node):
            try:
                yield key, Range.model_validate(node)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join((key, *map(str, first["loc"])))
                raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        elif isinstance(node, dict) and node:
            for name, inner in node.items():
                yield from walk(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(node, list | tuple) and node:
            yield key, tuple(node)
        else:
            raise ValueError(f"{key or 'it'} is {node!r}; allowed is a range {{low, high, log}} or a list of choices")

    if not isinstance(value, dict):
        return value
    return {key: node for key, node in dict(walk(value, "")).items() if node is not None}


def _min_accuracy(value: Any) -> Any:
    """Normalize to a share in [0, 1], or to ``plain - MARGIN``; white space is ignored."""
    if value is None:
        return None
    words = "".join(str(value).split())
    share = words.removeprefix("plain-")
    with contextlib.suppress(ValueError):
        if 0 <= float(share) <= 1:
            return float(share) if share == words else f"plain - {float(share)!r}"
    raise ValueError(f"{value!r} is not understood; allowed is a share from 0 to 1, or as in 'plain - 0.01'")


class Search(ConfigModel):
    """The search space, the score of a trial, and the budget."""

    space: Annotated[dict[str, Range | tuple[Any, ...]], BeforeValidator(_space)] = Field(min_length=1)
    """Settings to vary, as ``train.alpha: {low: 0.001, high: 0.1, log: true}`` or ``protection.width: [8, 16]``."""
    objective: Literal["both", "accuracy", "leakage"] = "both"
    """``both`` searches the Pareto front of validation accuracy (after 8-bit rounding) and leakage."""
    min_accuracy: Annotated[float | str | None, BeforeValidator(_min_accuracy)] = None
    """Minimum accuracy of a trial: a share such as 0.7, or ``plain - 0.01``, relative to plain images."""
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    """A sampler of Optuna; all three support one objective or both."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """Stops (``pbt``: redirects) trials by the accuracy on protected images. Privacy improves late in training."""
    grace_epochs: int = Field(2, ge=1)
    """Epochs before the scheduler may stop a trial, including the plain phase."""
    num_trials: int = Field(20, ge=1)
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; null uses the resources that the cluster has at the start. Set it for an autoscaling cluster."""
    max_minutes: float | None = Field(None, gt=0)
    """Minutes after which no trial starts and running trials stop; null sets no limit."""
    patience: int | None = Field(None, ge=1)
    """Finished trials in a row without a better front or objective, before the search ends; null sets no limit."""
    attack: dict[str, Any] = Field(
        default_factory=lambda: {"width": 16, "depth": 2, "patch": 2, "train": {"epochs": 2}}
    )
    """Options of the ``inverse`` attack that measures leakage in every trial."""
    attack_images: int | None = Field(None, ge=40)
    """Training images of this attack; null uses those of the trial."""
    suite: str | None = "small"
    """Attack suite that is run against the best bundles; null runs none."""
    num_attacked: int = Field(3, ge=0)
    """Bundles to attack with the suite: best accuracy, best privacy and knee, then others of the front."""
    gpus_per_trial: float = Field(1, gt=0, le=1)
    """GPUs of a trial with one worker, if the cluster has GPUs; with less than 1, several trials share a GPU."""

    @model_validator(mode="after")
    def _fits_together(self) -> Search:
        if self.scheduler != "pbt":
            return self
        if self.objective != "accuracy":
            raise ValueError("scheduler 'pbt' compares trials by accuracy; set objective to 'accuracy'")
        fixed = [key for key, values in self.space.items() if key not in MID_TRAINING or isinstance(values, tuple)]
        if fixed:
            raise ValueError(
                f"scheduler 'pbt' changes settings while a trial runs, but {fixed[0]} cannot change; allowed in its "
                f"space: a range of {', '.join(MID_TRAINING)}"
            )
        return self

    @property
    def margin(self) -> float | None:
        """Allowed loss of accuracy relative to plain images, if ``min_accuracy`` is relative."""
        return float(self.min_accuracy.partition("-")[2]) if isinstance(self.min_accuracy, str) else None


class SearchFile(ConfigModel):
    search: Search


@dataclass(frozen=True)
class SearchPlan:
    """A preset's settings, a search over them, and the folder of the results."""

    tree: dict[str, Any]
    search: Search
    storage: Storage

    @property
    def config(self) -> Config:
        """The configuration of a trial at the preset's own values."""
        return self.config_at({})

    def config_at(self, point: Point) -> Config:
        """The configuration of one point of the space; raises ConfigError if its settings are invalid."""
        settings: dict[str, Any] = {"cluster": {"storage": self.storage.folder(TRIALS).uri}}
        for key, value in point.items():
            settings = deep_merge(settings, unflatten(key.split("."), value))
        config = validate(deep_merge(self.tree, settings))
        check_milestones(config.train, "train")
        return config

    def corners(self) -> list[Point]:
        """Points that set one searched setting to one of its bounds or choices."""
        return [
            {key: value}
            for key, values in self.search.space.items()
            for value in ((values.low, values.high) if isinstance(values, Range) else values)
        ]

    def dump(self) -> dict[str, Any]:
        """Plain data from which :func:`restore_search_plan` rebuilds the plan in another process."""
        return {"settings": self.tree, "search": self.search.model_dump(mode="json"), "storage": self.storage.uri}


def restore_search_plan(dumped: dict[str, Any]) -> SearchPlan:
    return SearchPlan(dumped["settings"], Search.model_validate(dumped["search"]), Storage(dumped["storage"]))


def attack_options(search: Search) -> Any:
    """Options of the quick attack."""
    return ATTACKS.options("inverse").model_validate({"name": "inverse", **search.attack})


def make_search_plan(
    preset: str, files: Files = (), flags: Settings = (), *, storage: str = "runs", name: str
) -> SearchPlan:
    """Merge a preset, files and settings, and check the search space at its ends and choices.

    Raises:
        ConfigError: names the first invalid setting.
    """
    tree = load_tree(preset, files, flags, more=("search",))
    section = tree.pop("search", None)
    if section is None:
        raise ConfigError(
            f"preset {preset!r} has no section search; give one in a file (--config) or flags such as --search.space "
            "'{train.alpha: {low: 0.001, high: 0.1, log: true}}'"
        )
    search = validate_search(section)
    base = validate(tree)  # before the space, so that later errors are errors of the space
    check_milestones(base.train, "train")
    plan = SearchPlan(base.model_dump(mode="json"), search, Storage(storage).folder(validate_name(name)))
    for point in plan.corners():
        try:
            plan.config_at(point)
        except ConfigError as error:
            raise ConfigError(f"search.space.{next(iter(point))}: {error}") from None
    if base.data.stream:
        raise ConfigError("data.stream is True; a search holds its images in memory, for the attack in every trial")
    if search.scheduler == "pbt" and (base.cluster.num_workers or 1) > 1:
        raise ConfigError("search.scheduler 'pbt' needs trials of one worker; leave cluster.num_workers out")
    return plan


def validate_search(tree: Any) -> Search:
    """Validate a ``search`` section; raises ConfigError for the first invalid setting."""
    if not isinstance(tree, dict):
        raise ConfigError(f"search is {tree!r}; allowed is a mapping of its settings")
    try:
        search = SearchFile.model_validate({"search": tree}).search
    except ValidationError as error:
        raise ConfigError(format_validation_error(error, {"search": tree}, root=SearchFile)) from None
    try:
        check_milestones(attack_options(search).train, "search.attack.train")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("search.attack", *map(str, first["loc"])))
        raise ConfigError(f"{where} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    return search


@contextmanager
def open_search(plan: SearchPlan, *, resume: bool) -> Iterator[bool]:
    """Lock a search's folder: a new one, or with ``resume`` one of the same settings; yields whether it has started.

    Raises:
        StorageError: it exists already, or with ``resume`` it does not exist or has other settings.
    """
    storage = plan.storage
    if not storage.exists(FILE):
        if resume:
            raise StorageError(f"{storage.uri} is no search to resume; leave out --resume to start it")
        refuse_foreign(storage, "a search")
    if not storage.exists(SUMMARY):
        check_features(plan.config_at(point) for point in ({}, *plan.corners()))
    storage.create()
    with lock(storage, f"the search {storage.uri}"):
        has_started = storage.exists(FILE)
        if has_started and not resume:
            raise StorageError(f"{storage.uri} exists already; --resume continues it, another --name starts a new one")
        if has_started:
            _check_resumable(plan)
        else:
            storage.write(FILE, yaml.safe_dump(plan.dump(), sort_keys=False).encode())
        yield has_started


def _check_resumable(plan: SearchPlan) -> None:
    """Raise StorageError for the first setting that differs from the stored search."""
    new, old = plan.dump(), read_checked(plan.storage, FILE, "settings", "search")
    with contextlib.suppress(ConfigError):  # settings that are newer than the search have their default
        old["settings"] = validate(old["settings"]).model_dump(mode="json")
    for part, prefix in (("settings", ""), ("search", "search.")):
        before, now = _comparable(old[part]), _comparable(new[part])
        keys = sorted({*before, *now})
        refuse_changes(plan.storage, ((prefix + key, before.get(key), now.get(key)) for key in keys))


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that may change: the cluster, and the fallback of features, which a run resolves once."""
    compared = {key: value for key, value in settings.items() if key != "cluster"}
    if "features" in compared:
        compared["features"] = {key: value for key, value in compared["features"].items() if key != "fallback"}
    return compared


def read_record(folder: Storage) -> TrialRecord:
    """Read a trial's record; raises StorageError if it is damaged or of an earlier version."""
    record = read_checked(folder, RESULT, "status")
    if record["status"] == "done" and "leakage_baseline" not in record:
        raise StorageError(f"{folder.uri}/{RESULT} is of an earlier version; take another --name")
    return record


def trial_records(plan: SearchPlan) -> list[TrialRecord]:
    """Stored records of a search's trials, in the order of their names."""
    trials = plan.storage.folder(TRIALS)
    folders = [trials.folder(name) for name in trials.folders()]
    return [read_record(folder) for folder in folders if folder.exists(RESULT)]
