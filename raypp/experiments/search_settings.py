"""Settings of a search: its space, budgets and constraints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from raypp.attacks import ATTACKS
from raypp.config.overrides import deep_merge, unflatten
from raypp.config.schema import Config, ConfigModel
from raypp.config.validation import check_milestones, validate
from raypp.utils.storage import Storage

FILE, TRIALS, RESULT, SUMMARY = "search.yaml", "trials", "trial.json", "search.json"
MOST_QUERIES = 1000
MID_TRAINING = ("train.optimizer.lr",)
"""Settings that population based training may change while a trial runs: others lie in the optimiser's state, or change
the loss that epochs are compared by."""


class Range(ConfigModel):
    """Numbers from ``low`` to ``high``; whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Draw uniformly on a logarithmic scale."""

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
    """Flatten nested sections, and keep what describes values: a mapping with low and high, or a list of choices."""

    allowed = "allowed is a range {low, high, log} or a list of choices"

    def walk(node: Any, key: str) -> Iterator[tuple[str, Any]]:
        if node is None or isinstance(node, Range):  # null takes a setting of the preset's space out of it
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
            raise ValueError(f"{key or 'it'} is {node!r}; {allowed}")

    if not isinstance(value, dict):
        return value
    return {key: node for key, node in dict(walk(value, "")).items() if node is not None}


def _min_accuracy(value: Any) -> Any:
    """A share in [0, 1], or how far below plain images."""
    if value is None:
        return None
    words = "".join(str(value).split())
    share = words.removeprefix("plain-")
    try:
        if 0 <= float(share) <= 1:
            return float(share) if share == words else f"plain - {float(share)!r}"
    except ValueError:
        pass
    raise ValueError(f"{value!r} is not understood; allowed is a share from 0 to 1, or as in 'plain - 0.01'")


class Search(ConfigModel):
    """What is searched, how each trial is scored, and when the search ends."""

    space: Annotated[dict[str, Range | tuple[Any, ...]], BeforeValidator(_space)] = Field(min_length=1)
    """Settings to vary, as ``train.alpha: {low: 0.001, high: 0.1, log: true}`` or ``protection.width: [8, 16]``."""
    objective: Literal["both", "accuracy", "leakage"] = "both"
    """``both`` looks for the Pareto front of validation accuracy (after 8-bit rounding) and leakage."""
    min_accuracy: Annotated[float | str | None, BeforeValidator(_min_accuracy)] = None
    """What a trial has to reach: a share such as 0.7, or ``plain - 0.01``: that much below plain images."""
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    """Optuna's; all three search for one objective or for both."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """Stops (``pbt``: redirects) trials by the accuracy of protected images. Privacy matures late: give it time."""
    grace_epochs: int = Field(2, ge=1)
    """Epochs, the plain phase's included, before the scheduler judges a trial."""
    num_trials: int = Field(20, ge=1)
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; null takes as many as the cluster has room for at the start. Give it for one that grows."""
    max_minutes: float | None = Field(None, gt=0)
    """Start no trial and stop those that run after so many minutes; null sets no limit."""
    patience: int | None = Field(None, ge=1)
    """End after so many finished trials in a row that did not improve front or objective; null never does."""
    attack: dict[str, Any] = Field(
        default_factory=lambda: {"width": 16, "depth": 2, "patch": 2, "train": {"epochs": 2}}
    )
    """Options of the ``inverse`` attack that measures leakage in every trial."""
    attack_images: int | None = Field(None, ge=40)
    """Images that this attack learns from; null gives it the training images."""
    suite: str | None = "small"
    """Attack suite against the bundles that are handed over; null leaves them as they are."""
    num_attacked: int = Field(3, ge=0)
    """Bundles to attack with it: best accuracy, best privacy and knee, then others of the front."""
    gpus_per_trial: float = Field(1, gt=0, le=1)
    """Of a trial of one worker, where the cluster has GPUs; less than 1 packs several on one."""

    @model_validator(mode="after")
    def _fits_together(self) -> Search:
        if self.scheduler == "pbt":
            if self.objective != "accuracy":
                raise ValueError("scheduler 'pbt' passes on what is read best; set objective to 'accuracy'")
            for key, values in self.space.items():
                if key not in MID_TRAINING or not isinstance(values, Range):
                    raise ValueError(
                        f"scheduler 'pbt' changes settings while a trial runs, which {key} does not allow so; "
                        f"allowed in its space: a range of {', '.join(MID_TRAINING)}"
                    )
        return self

    @property
    def margin(self) -> float | None:
        """How far below plain images a trial may be, where ``min_accuracy`` says so."""
        return float(self.min_accuracy.partition("-")[2]) if isinstance(self.min_accuracy, str) else None


class SearchFile(ConfigModel):
    search: Search


@dataclass(frozen=True)
class SearchPlan:
    """A preset's settings, a search over them, and the folder of what comes of it."""

    tree: dict[str, Any]
    search: Search
    storage: Storage

    @property
    def config(self) -> Config:
        """Of a trial, with everything that is not searched."""
        return self.config_at({})

    def config_at(self, point: Point) -> Config:
        """The configuration of one point of the space; raises ConfigError where its settings do not go together."""
        settings: dict[str, Any] = {"cluster": {"storage": self.storage.folder(TRIALS).uri}}
        for key, value in point.items():
            settings = deep_merge(settings, unflatten(key.split("."), value))
        config = validate(deep_merge(self.tree, settings))
        check_milestones(config.train, "train")
        return config

    def corners(self) -> list[Point]:
        """Each setting of the space at its ends or choices, all others as in the preset."""
        return [
            {key: value}
            for key, values in self.search.space.items()
            for value in ((values.low, values.high) if isinstance(values, Range) else values)
        ]

    def dump(self) -> dict[str, Any]:
        """As plain data, from which :func:`restore` makes it again in another process."""
        return {"settings": self.tree, "search": self.search.model_dump(mode="json"), "storage": self.storage.uri}


def restore_search_plan(dumped: dict[str, Any]) -> SearchPlan:
    """The plan that ``Plan.dump`` described."""
    return SearchPlan(dumped["settings"], Search.model_validate(dumped["search"]), Storage(dumped["storage"]))


def attack_options(search: Search) -> Any:
    """Options of the quick attack."""
    return ATTACKS.options("inverse").model_validate({"name": "inverse", **search.attack})


Point = dict[str, Any]
