"""An attack run's target, suite and folder; opening and resuming it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raypp.attacks import ATTACKS
from raypp.attacks.array_target import ArrayTarget, load_array_target
from raypp.attacks.base import AttackerKnowledge
from raypp.attacks.suite import Suite, suite_presets
from raypp.attacks.target import Target, TargetSpec, load_target
from raypp.attacks.threat import threat_of
from raypp.attacks.trained import TrainedOptions
from raypp.bundle.locate import locate_bundle
from raypp.config.overrides import Settings, deep_merge, parse_overrides
from raypp.config.presets import load_tree, read_yaml
from raypp.config.validation import check_milestones, format_validation_error, validate
from raypp.experiments.run_folder import lock, read_checked, refuse_changes, refuse_foreign, validate_name
from raypp.utils.device import default_device
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.registry import MethodConfig, suggest
from raypp.utils.storage import Storage

SUITE, SCORECARD, SCORES, EXAMPLES = "suite.yaml", "scorecard.json", "scores.csv", "examples.safetensors"
REFERENCE_CLASSIFIER = "reference_classifier"
"""Folder of the reference classifier, and its name among the jobs of a run."""
CLIENT_CLASSIFIER = "client_classifier"
"""The same of the classifier that the client could run alone."""
FIXED_ON_RESUME = ("seed", "num_queries", "num_images", "curve", "reference_epochs")
"""Settings of a suite that a resumed run cannot change."""

Outcome = dict[str, Any]


@dataclass(frozen=True)
class AttackPlan:
    """A target, a suite, and the folder of the results."""

    spec: TargetSpec
    suite: Suite
    storage: Storage
    arrays: ArrayTarget | None = None
    """A target of this process, in place of what ``spec`` names."""

    def folder(self, attack: str) -> Storage:
        return self.storage.folder(f"attacks/{attack}")

    def dump(self) -> dict[str, Any]:
        """Plain data from which :func:`restore_attack_plan` rebuilds the plan in another process."""
        suite = self.suite.model_dump(mode="json")
        suite["attacks"] = {o.name: o.model_dump(mode="json", exclude={"name"}) for o in self.suite.attacks}
        return {"target": self.spec.model_dump(mode="json"), "suite": suite, "storage": self.storage.uri}


def restore_attack_plan(dumped: dict[str, Any], arrays: ArrayTarget | None = None) -> AttackPlan:
    spec = TargetSpec.model_validate(dumped["target"])
    return AttackPlan(spec, Suite.model_validate(dumped["suite"]), Storage(dumped["storage"]), arrays)


def make_attack_plan(
    *,
    bundle: str | None = None,
    function: str | None = None,
    folders: tuple[str, str] | None = None,
    arrays: ArrayTarget | None = None,
    preset: str | None = None,
    suite: str = "small",
    attacks: Sequence[str] = (),
    flags: Settings = (),
    storage: str | Path = "runs",
    name: str,
) -> AttackPlan:
    """Validate all settings of an attack run.

    Args:
        bundle, function, folders: the target, see :class:`TargetSpec`; or ``arrays``. Exactly one of the four. Any
            location of a bundle, see :func:`raypp.bundle.locate.locate_bundle`.
        preset: names the images of a function.
        suite: name of a shipped suite, or the path of a YAML file.
        attacks: the attacks to run; those that the suite lacks run with their defaults. Empty runs the whole suite.
        flags: settings of the suite (``--num_queries 500``), of an attack (``--inverse.train.epochs 5``), of the images
            (``--data.source.path x``) and of the cluster.

    Raises:
        ConfigError: names the first invalid setting.
    """
    tree = _read_suite(suite)
    overrides = parse_overrides(flags, (*(key for key in Suite.model_fields if key != "attacks"), "data", *ATTACKS))
    data = {"data": overrides.pop("data")} if "data" in overrides else {}
    changes = {key: overrides.pop(key) for key in list(overrides) if key in ATTACKS}
    options = _select_attacks(tree, attacks, changes)
    validated = _validate_suite(deep_merge(tree, overrides) | {"attacks": options})
    # This check is last: a flag without its value takes the word after it, which may be the bundle.
    if sum(target is not None for target in (bundle, function, folders, arrays)) != 1:
        raise ConfigError("name one target: a bundle, --function MODULE:NAME, or --folders PLAIN PROTECTED")
    if (folders is not None or arrays is not None) and data.get("data"):
        raise ConfigError("--data chooses the images of a bundle or a --function; folders and arrays bring their own")
    if preset is not None and function is None:
        raise ConfigError("a preset names the images of a --function; a bundle and folders bring their own")
    if arrays is not None:
        spec = TargetSpec(function=arrays.name)
    elif function is not None:
        spec = _function_spec(function, preset, data)
    elif bundle is not None:
        spec = TargetSpec(bundle=Storage(locate_bundle(bundle)).uri, config=data if data.get("data") else None)
    else:
        assert folders is not None
        plain, protected = (str(Path(folder).expanduser().absolute()) for folder in folders)
        spec = TargetSpec(folders=(plain, protected))
    return AttackPlan(spec, validated, Storage(storage).folder(validate_name(name)), arrays)


def _read_suite(suite: str) -> dict[str, Any]:
    shipped = suite_presets()
    if suite in shipped or Path(suite).suffix in {".yaml", ".yml"}:
        return read_yaml(shipped.get(suite, Path(suite)))
    raise ConfigError(
        f"unknown suite {suite!r}{suggest(suite, shipped)}; allowed: {', '.join(shipped)}, or the path of a .yaml file"
    )


def _select_attacks(tree: dict[str, Any], attacks: Sequence[str], overrides: dict[str, Any]) -> dict[str, Any]:
    """Options of each attack to run, with ``overrides`` by attack: the named ones, or all that the suite lists."""
    listed = tree.get("attacks") or {}
    if not isinstance(listed, dict):
        raise ConfigError(f"attacks is {listed!r}; allowed is a mapping of attacks to their options")
    for attack in attacks:
        if attack not in ATTACKS:
            raise ConfigError(f"unknown attack {attack!r}{suggest(attack, ATTACKS)}; allowed: {', '.join(ATTACKS)}")
    selected = {attack: listed.get(attack) for attack in ATTACKS if attack in attacks} or dict(listed)
    for attack, changes in overrides.items():
        if attack not in selected:
            raise ConfigError(f"--{attack} sets an attack that is not run; the attacks are {', '.join(selected)}")
        options = selected[attack] or {}
        for where, value in ((f"attacks.{attack}", options), (f"--{attack}", changes)):
            if not isinstance(value, dict):
                raise ConfigError(f"{where} is {value!r}; allowed are options of the attack, each by its name")
        selected[attack] = deep_merge(options, changes)
    return selected


def _validate_suite(tree: dict[str, Any]) -> Suite:
    try:
        suite = Suite.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(format_validation_error(error, tree, root=Suite)) from None
    for options in suite.attacks:
        if isinstance(options, TrainedOptions):
            check_milestones(options.train, f"{options.name}.train")
    if not suite.attacks:
        raise ConfigError(f"the suite has no attacks; allowed: {', '.join(ATTACKS)}")
    return suite


def _function_spec(function: str, preset: str | None, data: dict[str, Any]) -> TargetSpec:
    """The target of a Python function; ``data`` overrides the section of that name in the preset."""
    module, _, attribute = function.rpartition(":")
    search = None
    if module.endswith(".py"):
        function = f"{Path(module).expanduser().absolute()}:{attribute}"
    else:
        search = str(Path.cwd())
    config = validate(deep_merge(load_tree(preset or "cifar10-small"), data))
    check_milestones(config.train, "train")
    return TargetSpec(function=function, search=search, config=config.model_dump(mode="json"))


@contextmanager
def open_attack_plan(plan: AttackPlan, *, resume: bool) -> Iterator[tuple[AttackPlan, Target]]:
    """Lock the plan's folder: a new one, or with ``resume`` one of the same target, where attacks may be added.

    Yields the plan, including the attacks of earlier runs, and the target. An invalid plan does not create the folder.

    Raises:
        StorageError: the folder is in use, exists already, or belongs to another target or other images.
    """
    storage, dumped = plan.storage, plan.dump()
    target: Target | None = None
    if resume and not storage.exists(SUITE):
        raise StorageError(f"{storage.uri} does not exist; leave out --resume to start it")
    if not resume:
        _refuse_taken(storage)
        target = load_target_of(plan)  # before the folder: an invalid target creates none
        storage.create()
    with lock(storage, f"the attack run {storage.uri}"):
        stored: dict[str, Any] = {}
        if resume:
            stored = read_checked(storage, SUITE, "target", "suite")
            _check_resumable(storage, stored, dumped)
            dumped["suite"]["attacks"] = stored["suite"]["attacks"] | dumped["suite"]["attacks"]
            plan = restore_attack_plan(dumped, plan.arrays)
        else:
            _refuse_taken(storage)
        target = target or load_target_of(plan)
        if stored.get("identity", target.identity) != target.identity:
            raise StorageError(
                f"{storage.uri} was started against another version of {plan.spec.name}, so new results would not be "
                "comparable; take another --name"
            )
        storage.write(SUITE, yaml.safe_dump(dumped | {"identity": target.identity}, sort_keys=False).encode())
        yield plan, target


def _check_resumable(storage: Storage, stored: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise StorageError for the first setting that differs from the stored run."""
    old_attacks, new_attacks = stored["suite"]["attacks"], new["suite"]["attacks"]
    settings = [
        ("target", _comparable_target(stored["target"]), _comparable_target(new["target"])),
        *((key, stored["suite"].get(key), new["suite"][key]) for key in FIXED_ON_RESUME),
        *((name, old_attacks[name], options) for name, options in new_attacks.items() if name in old_attacks),
    ]
    refuse_changes(storage, settings)


def _comparable_target(spec: dict[str, Any]) -> dict[str, Any]:
    """A target without its import folder and cluster settings; a function's file is compared by its contents."""
    config = {key: value for key, value in (spec["config"] or {}).items() if key != "cluster"}
    return {key: value for key, value in spec.items() if key != "search"} | {"config": config}


def _refuse_taken(storage: Storage) -> None:
    if storage.exists(SUITE):
        raise StorageError(f"{storage.uri} exists already; --resume continues it, another --name starts a new one")
    if storage.exists("run.json"):
        raise StorageError(f"{storage.uri} holds a run of raypp train; take another --name")
    refuse_foreign(storage, "an attack run")


def describe_attack(options: MethodConfig, access: AttackerKnowledge) -> Outcome:
    """The part of an attack's result that is known before it runs against a target with this knowledge."""
    kind = ATTACKS.get(options.name)
    threat = threat_of(kind, kind.used_knowledge(options, access))
    return {"attack": options.name, "threat": threat.name, "threat_meaning": threat.meaning}


def load_result(plan: AttackPlan, attack: str) -> Outcome | None:
    """The stored result of a finished attack, or None."""
    folder = plan.folder(attack)
    if not folder.exists("result.json"):
        return None
    try:
        result: Outcome = json.loads(folder.read("result.json"))
    except ValueError as error:
        raise StorageError(
            f"{folder.uri}/result.json is damaged ({error}); delete it, and --resume runs this attack again"
        ) from error
    return result


def load_target_of(plan: AttackPlan) -> Target:
    suite = plan.suite
    options: dict[str, Any] = {
        "num_queries": suite.num_queries, "num_images": suite.num_images, "seed": suite.seed,
        "device": default_device(suite.cluster.gpu),
    }  # fmt: skip
    if plan.arrays is not None:
        return load_array_target(plan.arrays, **options)
    return load_target(plan.spec, **options)


def dependencies(plan: AttackPlan, name: str) -> list[str]:
    """Attacks of the suite whose results this one uses."""
    return [earlier for earlier in ATTACKS.get(name).after if any(o.name == earlier for o in plan.suite.attacks)]


def dependencies_first(plan: AttackPlan) -> list[str]:
    """The suite's attacks; those that use the result of another come last. Dependencies have one level."""
    names = [options.name for options in plan.suite.attacks]
    return sorted(names, key=lambda name: bool(dependencies(plan, name)))


def threat_table(plan: AttackPlan, target: Target) -> list[tuple[str, str, str]]:
    """Name, threat level and attacker knowledge of each attack."""
    rows = [describe_attack(plan.suite.options(name), target.access) for name in dependencies_first(plan)]
    return [(row["attack"], row["threat"], row["threat_meaning"]) for row in rows]
