"""Hyperparameter search: make, validate and open the plan of a search.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from pydantic import ValidationError

from raypp.config.presets import load_tree
from raypp.config.validation import check_milestones, format_validation_error, validate
from raypp.experiments.run_folder import lock, read_checked, refuse_foreign, validate_name
from raypp.experiments.search_settings import FILE, SUMMARY, Search, SearchFile, SearchPlan, attack_options
from raypp.training.protection_task import check_features
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.storage import Storage


def make_search_plan(
    preset: str, file: str | None = None, flags: Sequence[str] = (), *, storage: str = "runs", name: str
) -> SearchPlan:
    """Merge a preset, a file and flags, and check the search space at its ends and choices.

    Raises:
        ConfigError: names the first invalid setting.
    """
    tree = load_tree(preset, file, flags, more=("search",))
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
    storage, new = plan.storage, plan.dump()
    old = read_checked(storage, FILE, "settings", "search")
    with contextlib.suppress(ConfigError):  # settings that are newer than the search have their default
        old["settings"] = validate(old["settings"]).model_dump(mode="json")
    for part, prefix in (("settings", ""), ("search", "search.")):
        before, now = _comparable(old[part]), _comparable(new[part])
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise StorageError(
                    f"{storage.uri} was started with another {prefix}{key}; resume it with the same, or take another "
                    "--name"
                )


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that may change: the cluster, and the fallback of features, which a run resolves once."""
    compared = {key: value for key, value in settings.items() if key != "cluster"}
    if "features" in compared:
        compared["features"] = {key: value for key, value in compared["features"].items() if key != "fallback"}
    return compared
