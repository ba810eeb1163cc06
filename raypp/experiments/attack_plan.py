"""An attack run's target, suite and folder; opening and resuming it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from raypp.attacks import ATTACKS
from raypp.attacks.base import TrainedOptions
from raypp.attacks.suite import Suite, suite_presets
from raypp.attacks.target import Target, TargetSpec, load_target
from raypp.config.overrides import deep_merge, parse_overrides
from raypp.config.presets import load_config, read_yaml
from raypp.config.validation import check_milestones, format_validation_error
from raypp.experiments.run_folder import lock, read_checked, refuse_foreign, validate_name
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.registry import suggest
from raypp.utils.storage import Storage

SUITE, SCORECARD, SCORES, EXAMPLES = "suite.yaml", "scorecard.json", "scores.csv", "examples.safetensors"
REFERENCE_CLASSIFIER = "judge"
FIXED_ON_RESUME = ("seed", "num_queries", "num_images", "curve", "reference_epochs")
"""Settings of a suite that a resumed run cannot change."""

Outcome = dict[str, Any]


@dataclass(frozen=True)
class AttackPlan:
    """A victim, a suite, and the folder of what comes of them."""

    spec: TargetSpec
    suite: Suite
    storage: Storage

    def folder(self, attack: str) -> Storage:
        return self.storage.folder(f"attacks/{attack}")

    def dump(self) -> dict[str, Any]:
        """As plain data, from which :func:`restore` makes it again in another process."""
        suite = self.suite.model_dump(mode="json")
        suite["attacks"] = {o["name"]: {k: v for k, v in o.items() if k != "name"} for o in suite["attacks"]}
        return {"victim": self.spec.model_dump(mode="json"), "suite": suite, "storage": self.storage.uri}


def restore_attack_plan(dumped: dict[str, Any]) -> AttackPlan:
    """The plan that ``Plan.dump`` described."""
    spec = TargetSpec.model_validate(dumped["victim"])
    return AttackPlan(spec, Suite.model_validate(dumped["suite"]), Storage(dumped["storage"]))


def make_attack_plan(
    *,
    bundle: str | None = None,
    function: str | None = None,
    folders: tuple[str, str] | None = None,
    preset: str | None = None,
    suite: str = "small",
    attacks: Sequence[str] = (),
    flags: Sequence[str] = (),
    storage: str | Path = "runs",
    name: str,
) -> AttackPlan:
    """Put a plan together.

    Args:
        bundle, function, folders: the victim, one of the three; see :class:`VictimSpec`.
        preset: of a function's images.
        suite: name of a shipped suite, or the path of a YAML file.
        attacks: only these of the suite, or others at their defaults; none takes all of the suite.
        flags: settings of the suite (``--num_queries 500``), of an attack (``--inverse.train.epochs 5``), of the images
            (``--data.source.path x``) and of the cluster.

    Raises:
        ConfigError: one sentence about the first thing that is not allowed.
    """
    known = suite_presets()
    if suite in known:
        tree = read_yaml(known[suite])
    elif Path(suite).suffix in {".yaml", ".yml"}:
        tree = read_yaml(Path(suite))
    else:
        raise ConfigError(
            f"unknown suite {suite!r}{suggest(suite, known)}; allowed: {', '.join(known)}, or the path of a .yaml file"
        )
    listed = tree.get("attacks") or {}
    if not isinstance(listed, dict):
        raise ConfigError(f"attacks is {listed!r}; allowed is a mapping of attacks to their options")
    chosen = dict(listed)
    if attacks:
        for attack in attacks:
            if attack not in ATTACKS:
                raise ConfigError(f"unknown attack {attack!r}{suggest(attack, ATTACKS)}; allowed: {', '.join(ATTACKS)}")
        chosen = {attack: chosen.get(attack) for attack in ATTACKS if attack in attacks}
    given = parse_overrides(flags, (*(name for name in Suite.model_fields if name != "attacks"), "data", *ATTACKS))
    data = given.pop("data", None)
    for attack in [key for key in given if key in ATTACKS]:
        if attack not in chosen:
            raise ConfigError(f"--{attack} sets an attack that is not run; the attacks are {', '.join(chosen)}")
        options, changes = chosen[attack] or {}, given.pop(attack)
        for what, value in ((f"attacks.{attack}", options), (f"--{attack}", changes)):
            if not isinstance(value, dict):
                raise ConfigError(f"{what} is {value!r}; allowed are options of the attack, each by its name")
        chosen[attack] = deep_merge(options, changes)
    tree = deep_merge(tree, given) | {"attacks": chosen}
    try:
        validated = Suite.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(format_validation_error(error, tree, root=Suite)) from None
    for options in validated.attacks:
        if isinstance(options, TrainedOptions):
            check_milestones(options.train, f"{options.name}.train")
    if not validated.attacks:
        raise ConfigError(f"the suite has no attacks; allowed: {', '.join(ATTACKS)}")
    # Last, for a setting without its value would have taken the bundle's place.
    if sum(victim is not None for victim in (bundle, function, folders)) != 1:
        raise ConfigError("name one victim: a bundle, --function MODULE:NAME, or --folders PLAIN PROTECTED")
    config: dict[str, Any] | None = {"data": data} if data else None
    search = None
    if folders is not None and data:
        raise ConfigError("--data chooses the images of a bundle or a --function; --folders brings its own")
    if function is not None:
        module, _, attribute = function.rpartition(":")
        if module.endswith(".py"):
            function = f"{Path(module).expanduser().absolute()}:{attribute}"
        else:
            search = str(Path.cwd())
        config = load_config(preset or "cifar10-small", flags=_data_flags(flags)).model_dump(mode="json")
    elif preset is not None:
        raise ConfigError("a preset names the images of a --function; a bundle and folders bring their own")
    where = absolute_folders(folders)
    spec = TargetSpec(bundle=_bundle_uri(bundle), function=function, search=search, folders=where, config=config)
    return AttackPlan(spec, validated, Storage(storage).folder(validate_name(name)))


def _data_flags(flags: Sequence[str]) -> list[str]:
    """The flags about images alone."""
    kept: list[str] = []
    for i, flag in enumerate(flags):
        if flag.startswith("--data"):
            kept += [flag] if "=" in flag else [flag, *flags[i + 1 : i + 2]]
    return kept


def _bundle_uri(location: str | None) -> str | None:
    return None if location is None else Storage(location).uri


def absolute_folders(folders: tuple[str, str] | None) -> tuple[str, str] | None:
    if folders is None:
        return None
    return str(Path(folders[0]).expanduser().absolute()), str(Path(folders[1]).expanduser().absolute())


@contextmanager
def open_attack_plan(plan: AttackPlan, *, resume: bool) -> Iterator[tuple[AttackPlan, Target]]:
    """Hold the plan's folder: a new one, or with ``resume`` one of the same victim, where attacks may be added.

    Gives the plan, with the attacks that were there before, and the victim. A mistake found on the way there does not
    use up the name.

    Raises:
        StorageError: it is in use, exists already, or was made for another victim or other images.
    """
    storage, now = plan.storage, plan.dump()
    victim: Target | None = None
    if resume and not storage.exists(SUITE):
        raise StorageError(f"{storage.uri} does not exist; leave out --resume to start it")
    if not resume:
        _refuse_taken(storage)
        victim = load_target_of(restore_attack_plan(now))  # before the folder: a mistake found here leaves no trace
        storage.create()
    with lock(storage, f"the attack run {storage.uri}"):
        before: dict[str, Any] | None = None
        if not resume:
            _refuse_taken(storage)
        else:
            before = read_checked(storage, SUITE, "victim", "suite")
            for key, was, new in (
                ("victim", _comparable_target(before["victim"]), _comparable_target(now["victim"])),
                *((k, before["suite"][k], now["suite"][k]) for k in FIXED_ON_RESUME),
                *(
                    (k, before["suite"]["attacks"][k], v)
                    for k, v in now["suite"]["attacks"].items()
                    if k in before["suite"]["attacks"]
                ),
            ):
                if was != new:
                    raise StorageError(
                        f"{storage.uri} was started with another {key}; resume it with the same, or take another --name"
                    )
            now["suite"]["attacks"] = before["suite"]["attacks"] | now["suite"]["attacks"]
        plan = restore_attack_plan(now)
        victim = victim or load_target_of(plan)
        if before is not None and before.get("identity", victim.identity) != victim.identity:
            raise StorageError(
                f"{storage.uri} was started against another version of {plan.spec.name}; its results would not go "
                "together with new ones: take another --name"
            )
        storage.write(SUITE, yaml.safe_dump(now | {"identity": victim.identity}, sort_keys=False).encode())
        yield plan, victim


def _comparable_target(spec: dict[str, Any]) -> dict[str, Any]:
    """A victim without what the current folder alone decides; a function's own file is compared by its contents."""
    config = {key: value for key, value in (spec["config"] or {}).items() if key != "cluster"}
    return {key: value for key, value in spec.items() if key != "search"} | {"config": config}


def _refuse_taken(storage: Storage) -> None:
    if storage.exists(SUITE):
        raise StorageError(f"{storage.uri} exists already; --resume continues it, another --name starts anew")
    if storage.exists("run.json"):
        raise StorageError(f"{storage.uri} holds a run of raypp train; take another --name")
    refuse_foreign(storage, "an attack run")


# One attack


def load_result(plan: AttackPlan, attack: str) -> Outcome | None:
    """What an attack gave if it has been run to its end."""
    folder = plan.folder(attack)
    if not folder.exists("result.json"):
        return None
    try:
        found: Outcome = json.loads(folder.read("result.json"))
    except ValueError as error:
        raise StorageError(
            f"{folder.uri}/result.json is damaged ({error}); delete it, and --resume runs this attack again"
        ) from error
    return found


def load_target_of(plan: AttackPlan, device: torch.device | None = None) -> Target:
    """The plan's victim."""
    suite = plan.suite
    return load_target(
        plan.spec, num_queries=suite.num_queries, num_images=suite.num_images, seed=suite.seed, device=device
    )


# All of them


def dependencies(plan: AttackPlan, name: str) -> list[str]:
    """Attacks of the suite that have to end before this one begins."""
    return [earlier for earlier in ATTACKS.get(name).after if any(o.name == earlier for o in plan.suite.attacks)]


def topological_order(plan: AttackPlan) -> list[str]:
    """The suite's attacks, each after those that it builds on."""
    names = [options.name for options in plan.suite.attacks]
    return sorted(names, key=lambda name: bool(dependencies(plan, name)))


def threat_table(plan: AttackPlan) -> list[tuple[str, str, str]]:
    """Each attack's name, threat level and what the attacker has, for printing before anything runs."""
    return [(n, ATTACKS.get(n).threat.name, ATTACKS.get(n).threat.meaning) for n in topological_order(plan)]
