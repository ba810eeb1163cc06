"""A search: which configurations are tried, how each is scored, and what is handed over in the end.

NAME/search.yaml          what was asked for
NAME/trials/TRIAL/        a training run each, leak/ with its quick attack, trial.json with its scores
NAME/trials.csv, .parquet every trial, rewritten whenever one ends
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
        ConfigError: one sentence about the first thing that is not allowed.
    """
    tree = load_tree(preset, file, flags, more=("search",))
    given = tree.pop("search", None)
    if given is None:
        raise ConfigError(
            f"preset {preset!r} has no section search; give one in a file (--config) or flags such as --search.space "
            "'{train.alpha: {low: 0.001, high: 0.1, log: true}}'"
        )
    search = validate_search(given)
    base = validate(tree)  # before the space, whose faults are then its own
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
    """Validate a ``search`` section; raises ConfigError with one sentence for the first thing that is wrong."""
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
    """Hold a search's folder, a new one or with ``resume`` one of the same settings; gives whether it had begun.

    Raises:
        StorageError: it exists already, or with ``resume`` does not, or was asked for other things.
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
        begun = storage.exists(FILE)
        if begun and not resume:
            raise StorageError(f"{storage.uri} exists already; --resume continues it, another --name starts anew")
        now = plan.dump()
        if begun:
            before = read_checked(storage, FILE, "settings", "search")
            with contextlib.suppress(ConfigError):  # settings that have come since then have their default
                before["settings"] = validate(before["settings"]).model_dump(mode="json")
            # A run that has begun keeps its feature network, so that this may change.
            before["settings"], now["settings"] = map(_without_fallback, (before["settings"], now["settings"]))
            for part in ("settings", "search"):
                for key in sorted({*before[part], *now[part]}):
                    if key != "cluster" and before[part].get(key) != now[part].get(key):
                        name = key if part == "settings" else f"search.{key}"
                        raise StorageError(
                            f"{storage.uri} was started with another {name}; resume it with the same, or take another "
                            "--name"
                        )
        else:
            storage.write(FILE, yaml.safe_dump(now, sort_keys=False).encode())
        yield begun


def _without_fallback(settings: dict[str, Any]) -> dict[str, Any]:
    features = {key: value for key, value in settings["features"].items() if key != "fallback"}
    return settings | {"features": features}
