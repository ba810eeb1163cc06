"""The attack ladder: every attack of a suite against one victim, each resumable, and the scorecard that comes of them.

NAME/suite.yaml           what was asked for: victim, suite, where images come from
NAME/attacks/ATTACK/      of each attack: training checkpoints, network.safetensors, estimates.safetensors, result.json
NAME/judge/               the plain classifier that reads reconstructions, where one is trained for it
NAME/scorecard.json       everything measured; scores.csv has it image by image
NAME/examples.safetensors pictures for reports
"""

from __future__ import annotations

import csv
import io
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError
from torch import Tensor, nn

from raypp import bundle as bundles
from raypp.attacks import ATTACKS
from raypp.attacks.base import Access, Attack, AttackError, Map, TrainedAttack, TrainedOptions, fitted
from raypp.attacks.target import Victim, VictimSpec, load_victim
from raypp.config import (
    Cluster,
    Config,
    Section,
    Seed,
    check_milestones,
    load_config,
    merge,
    parse_flags,
    read_yaml,
    sentence,
)
from raypp.evaluation.scorecard import (
    INCONCLUSIVE,
    MIN_QUERIES,
    RED,
    Scores,
    measure,
    nulls,
    share_found,
    still_rising,
    strength,
    summarise,
    verdict,
    worst,
)
from raypp.experiments.training_run import (
    checked_name,
    environment,
    lock,
    one_at_a_time,
    open_run,
    refuse_foreign,
    stored,
    train_locally,
)
from raypp.metrics import chance_error
from raypp.models.perceptual import StateDict
from raypp.training.distributed import first
from raypp.training.reporter import LocalSink, Row, Sink
from raypp.training.trainer import Loop, set_up_torch, together
from raypp.utils.errors import ConfigError, RayppError, StorageError
from raypp.utils.progress import Display, GridDisplay, Shows
from raypp.utils.registry import Options, did_you_mean
from raypp.utils.signals import told_by
from raypp.utils.storage import Storage

SUITE, SCORECARD, SCORES, EXAMPLES = "suite.yaml", "scorecard.json", "scores.csv", "examples.safetensors"
NUM_SHOWN = 10
HALF_EPOCHS, QUARTER, SIXTEENTH = "half the epochs", "a quarter of the images", "a sixteenth of the images"
CURVE = ((HALF_EPOCHS, 0.5, 1.0), (SIXTEENTH, 1.0, 1 / 16), (QUARTER, 1.0, 0.25))
"""Of each trained attack's further trainings: name, share of the epochs, share of the images."""
HALF_EFFORT = "half the steps"
JUDGE = "judge"
SETTLED = ("seed", "num_queries", "num_images", "curve", "judge_epochs")
"""Settings of a suite that a resumed run cannot change."""

Outcome = dict[str, Any]


def _attacks(value: Any) -> Any:
    """Validate each attack's options against those of its class."""
    if not isinstance(value, dict):
        return value
    found = []
    for name, options in value.items():
        given = {} if options is None else options
        if not isinstance(given, dict):
            raise ValueError(f"attacks.{name} is {given!r}; allowed is a mapping of its options")
        try:
            found.append(ATTACKS.options(name).model_validate({"name": name, **given}))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join((name, *map(str, first["loc"])))
            raise ValueError(f"{where} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    return tuple(found)


class Suite(Section):
    """Which attacks are run, how strong, and on how many images."""

    seed: Seed = 0
    num_queries: int = Field(2000, ge=10)
    """Test images that are attacked, at most; all of the test split are the gallery."""
    num_images: int | None = Field(None, ge=20)
    """Images of his own that the attacker has; null gives him the whole training split."""
    curve: bool = True
    """Train again with half the epochs, a quarter and a sixteenth of the images, to see whether leakage still rises."""
    judge_epochs: int = Field(3, ge=0)
    """Epochs of a plain classifier that reads the reconstructions, where the bundle brings none; 0 does without."""
    attacks: Annotated[tuple[SerializeAsAny[Options], ...], BeforeValidator(_attacks)]
    cluster: Cluster = Field(default_factory=Cluster)

    def options(self, name: str) -> Options:
        return next(options for options in self.attacks if options.name == name)


def suites() -> dict[str, Path]:
    """Shipped suites by name."""
    folder = Path(str(resources.files("raypp") / "presets" / "attacks"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


@dataclass(frozen=True)
class Plan:
    """A victim, a suite, and the folder of what comes of them."""

    spec: VictimSpec
    suite: Suite
    storage: Storage

    def folder(self, attack: str) -> Storage:
        return self.storage.folder(f"attacks/{attack}")

    def dump(self) -> dict[str, Any]:
        """As plain data, from which :func:`restore` makes it again in another process."""
        suite = self.suite.model_dump(mode="json")
        suite["attacks"] = {o["name"]: {k: v for k, v in o.items() if k != "name"} for o in suite["attacks"]}
        return {"victim": self.spec.model_dump(mode="json"), "suite": suite, "storage": self.storage.uri}


def restore(dumped: dict[str, Any]) -> Plan:
    """The plan that ``Plan.dump`` described."""
    spec = VictimSpec.model_validate(dumped["victim"])
    return Plan(spec, Suite.model_validate(dumped["suite"]), Storage(dumped["storage"]))


def make_plan(
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
) -> Plan:
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
    known = suites()
    if suite in known:
        tree = read_yaml(known[suite])
    elif Path(suite).suffix in {".yaml", ".yml"}:
        tree = read_yaml(Path(suite))
    else:
        raise ConfigError(
            f"unknown suite {suite!r}{did_you_mean(suite, known)}; allowed: {', '.join(known)}, or the path of a .yaml "
            "file"
        )
    listed = tree.get("attacks") or {}
    if not isinstance(listed, dict):
        raise ConfigError(f"attacks is {listed!r}; allowed is a mapping of attacks to their options")
    chosen = dict(listed)
    if attacks:
        for attack in attacks:
            if attack not in ATTACKS:
                raise ConfigError(
                    f"unknown attack {attack!r}{did_you_mean(attack, ATTACKS)}; allowed: {', '.join(ATTACKS)}"
                )
        chosen = {attack: chosen.get(attack) for attack in ATTACKS if attack in attacks}
    given = parse_flags(flags, (*(name for name in Suite.model_fields if name != "attacks"), "data", *ATTACKS))
    data = given.pop("data", None)
    for attack in [key for key in given if key in ATTACKS]:
        if attack not in chosen:
            raise ConfigError(f"--{attack} sets an attack that is not run; the attacks are {', '.join(chosen)}")
        options, changes = chosen[attack] or {}, given.pop(attack)
        for what, value in ((f"attacks.{attack}", options), (f"--{attack}", changes)):
            if not isinstance(value, dict):
                raise ConfigError(f"{what} is {value!r}; allowed are options of the attack, each by its name")
        chosen[attack] = merge(options, changes)
    tree = merge(tree, given) | {"attacks": chosen}
    try:
        validated = Suite.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(sentence(error, tree, root=Suite)) from None
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
    spec = VictimSpec(bundle=_settled(bundle), function=function, search=search, folders=where, config=config)
    return Plan(spec, validated, Storage(storage).folder(checked_name(name)))


def _data_flags(flags: Sequence[str]) -> list[str]:
    """The flags about images alone."""
    kept: list[str] = []
    for i, flag in enumerate(flags):
        if flag.startswith("--data"):
            kept += [flag] if "=" in flag else [flag, *flags[i + 1 : i + 2]]
    return kept


def _settled(location: str | None) -> str | None:
    return None if location is None else Storage(location).uri


def absolute_folders(folders: tuple[str, str] | None) -> tuple[str, str] | None:
    if folders is None:
        return None
    return str(Path(folders[0]).expanduser().absolute()), str(Path(folders[1]).expanduser().absolute())


@contextmanager
def open_plan(plan: Plan, *, resume: bool) -> Iterator[tuple[Plan, Victim]]:
    """Hold the plan's folder: a new one, or with ``resume`` one of the same victim, where attacks may be added.

    Gives the plan, with the attacks that were there before, and the victim. A mistake found on the way there does not
    use up the name.

    Raises:
        StorageError: it is in use, exists already, or was made for another victim or other images.
    """
    storage, now = plan.storage, plan.dump()
    victim: Victim | None = None
    if resume and not storage.exists(SUITE):
        raise StorageError(f"{storage.uri} does not exist; leave out --resume to start it")
    if not resume:
        _refuse_taken(storage)
        victim = load_victim_of(restore(now))  # before the folder: a mistake found here leaves no trace
        storage.create()
    with lock(storage, f"the attack run {storage.uri}"):
        before: dict[str, Any] | None = None
        if not resume:
            _refuse_taken(storage)
        else:
            before = stored(storage, SUITE, "victim", "suite")
            for key, was, new in (
                ("victim", _wherever(before["victim"]), _wherever(now["victim"])),
                *((k, before["suite"][k], now["suite"][k]) for k in SETTLED),
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
        plan = restore(now)
        victim = victim or load_victim_of(plan)
        if before is not None and before.get("identity", victim.identity) != victim.identity:
            raise StorageError(
                f"{storage.uri} was started against another version of {plan.spec.name}; its results would not go "
                "together with new ones: take another --name"
            )
        storage.write(SUITE, yaml.safe_dump(now | {"identity": victim.identity}, sort_keys=False).encode())
        yield plan, victim


def _wherever(spec: dict[str, Any]) -> dict[str, Any]:
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


def finished(plan: Plan, attack: str) -> Outcome | None:
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


def run_attack(plan: Plan, name: str, display: Shows, victim: Victim | None = None) -> Outcome:
    """Run one attack to its end, from where it was stopped; store and return its result.

    In an initialised process group all processes call it: they train together, and the first does the rest.

    Args:
        victim: already loaded, or None.

    Raises:
        RayppError: the victim cannot be loaded or fails; an attack that does not apply to it is a result, not an error.
    """
    if (found := finished(plan, name)) is not None:
        return found
    suite, folder = plan.suite, plan.folder(name)
    began = time.monotonic()
    victim = victim or load_victim_of(plan)
    kind, options = ATTACKS.get(name), suite.options(name)
    about: Outcome = {
        "attack": name,
        "threat": kind.threat.name,
        "threat_meaning": kind.threat.meaning,
        "options": options.model_dump(mode="json"),
        "victim": victim.fingerprint,
    }
    try:
        attack: Attack = kind(options, _with_earlier(plan, kind, victim.access), seed=suite.seed)
        history: list[Row] = []
        curve: list[dict[str, Any]] = []
        if isinstance(attack, TrainedAttack):
            history, curve = _train(attack, plan, name, victim, display)
        if not first():
            return about
        attack.prepare()
        num = min(len(victim.plain), attack.max_queries or len(victim.plain))
        torch.manual_seed(suite.seed)
        estimates = fitted(attack.reconstruct(victim.protected[:num]), victim.access.shape).cpu()
        if attack.effort is not None and suite.curve:
            curve = _half_effort(attack, estimates, plan, victim)
    except AttackError as error:
        result = about | {"status": "does not apply", "note": str(error)}
        if first():
            folder.write("result.json", _json(result))
        return result
    from safetensors.torch import save

    folder.write("estimates.safetensors", save({"estimates": estimates.contiguous()}))
    summary = summarise(measure(estimates, victim), suite.seed)
    result = about | {
        "status": "done",
        "note": attack.note,
        "num_queries": num,
        "seconds": round(time.monotonic() - began, 1),
        "scores": summary,
        "history": history,
        "curve": curve,
    }
    folder.write("result.json", _json(result))
    return result


def _half_effort(attack: Attack, estimates: Tensor, plan: Plan, victim: Victim) -> list[dict[str, Any]]:
    """The curve of an attack that is no training: what it finds with half its effort, and with all of it."""
    assert attack.effort is not None
    full = attack.options
    attack.options = full.model_copy(update={attack.effort: max(1, getattr(full, attack.effort) // 2)})
    torch.manual_seed(plan.suite.seed)
    half = fitted(attack.reconstruct(victim.protected[: len(estimates)]), victim.access.shape)
    attack.options = full
    points = ((HALF_EFFORT, half), ("everything", estimates))
    return [{"what": what} | _leak(images, victim) for what, images in points]


def load_victim_of(plan: Plan, device: torch.device | None = None) -> Victim:
    """The plan's victim."""
    suite = plan.suite
    return load_victim(
        plan.spec, num_queries=suite.num_queries, num_images=suite.num_images, seed=suite.seed, device=device
    )


def _train(
    attack: TrainedAttack, plan: Plan, name: str, victim: Victim, display: Shows
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Train the attack's network, and for its curve smaller ones; leaves the attack loaded with the full one."""
    folder, total = plan.folder(name), attack.num_images

    def make(storage: Storage) -> Sink:
        return LocalSink(storage, display, victim.access.device)

    sink = make(folder)
    num_workers = sink.world
    full, history = _fit(attack, sink, 1.0, None)
    attack.load(full)
    if first():
        _save_network(folder, full)
    curve = []
    if plan.suite.curve:
        for label, epochs, share in CURVE:
            num = max(2, num_workers, round(share * total)) if share < 1 else None
            if epochs < 1 and round(epochs * attack.epochs) in (0, attack.epochs):
                continue  # one epoch has no half: whether more of them would help stays unknown
            state, rows = _fit(attack, make(folder.folder(label.replace(" ", "_"))), epochs, num)
            if first():
                attack.load(state)
                point = {"what": label, "epochs": len(rows), "num_images": num or total}
                curve.append(point | _leak(attack.reconstruct(victim.protected), victim))
        if first():
            attack.load(full)
            curve.append(
                {"what": "everything", "epochs": len(history), "num_images": total}
                | _leak(attack.reconstruct(victim.protected), victim)
            )
    return history, curve


def _fit(attack: TrainedAttack, sink: Sink, epochs: float, num_images: int | None) -> tuple[StateDict, list[Row]]:
    task = attack.task(epochs, num_images)
    together(lambda: task.share(sink.rank, sink.world))  # refuses fewer images than workers
    set_up_torch(task.train)
    done = Loop(task, sink).run()
    return attack.state(done.trainee), done.history


def _leak(estimates: Tensor, victim: Victim) -> dict[str, float]:
    scores = measure(fitted(estimates, victim.access.shape), victim)
    means = {key: {"mean": round(float(values.double().mean()), 5)} for key, values in scores.items()}
    return {"found": share_found(means)} | {
        key: means[key]["mean"] for key in ("ssim", "ssim_invariant", "psnr", "reidentified")
    }


def _save_network(folder: Storage, state: StateDict) -> None:
    from safetensors.torch import save

    folder.write("network.safetensors", save({k: v.contiguous() for k, v in state.items()}))


def load_network(folder: Storage, options: Options, access: Access) -> Map:
    """An attack's trained network as a map from protected to plain images."""
    from safetensors.torch import load

    attack: TrainedAttack = ATTACKS.build(options, access)
    attack.load(load(folder.read("network.safetensors")))
    return attack.reconstruct


def _with_earlier(plan: Plan, kind: type[Attack], access: Access) -> Access:
    from dataclasses import replace

    networks = {}
    for name in kind.after:
        if any(o.name == name for o in plan.suite.attacks) and plan.folder(name).exists("network.safetensors"):
            networks[name] = load_network(plan.folder(name), plan.suite.options(name), access)
    return replace(access, earlier=networks) if networks else access


# All of them


def waits_for(plan: Plan, name: str) -> list[str]:
    """Attacks of the suite that have to end before this one begins."""
    return [earlier for earlier in ATTACKS.get(name).after if any(o.name == earlier for o in plan.suite.attacks)]


def in_order(plan: Plan) -> list[str]:
    """The suite's attacks, each after those that it builds on."""
    names = [options.name for options in plan.suite.attacks]
    return sorted(names, key=lambda name: bool(waits_for(plan, name)))


def run_locally(
    plan: Plan, missing: Sequence[str], display: GridDisplay, ended: Callable[[str, Outcome], None]
) -> None:
    """Run attacks in this process, one after the other; ``ended`` is told of each ``{"result"}`` or ``{"error"}``.

    Raises:
        ToldToStop: by ``display`` or SIGTERM, after a checkpoint.
    """
    victim = load_victim_of(plan)
    with told_by(display.stop, signal.SIGTERM):
        for name in missing:
            display.end_if_told()
            try:
                if name == JUDGE:
                    train_judge(plan, victim, display.of(JUDGE))
                    outcome: Outcome = {"result": {}}
                else:
                    outcome = {"result": run_attack(plan, name, display.of(name), victim)}
            except RayppError as error:
                outcome = {"error": str(error)}
            except Exception as error:  # one attack's defect is not the others'; Ray's tasks do likewise
                outcome = {"error": f"it failed: {type(error).__name__}: {' '.join(str(error).split())}"}
            ended(name, outcome)


def attack(
    plan: Plan,
    *,
    resume: bool = False,
    quiet: bool = False,
    announce: Callable[[Plan], None] = lambda _: None,
    run: Callable[[Plan, Sequence[str], GridDisplay, Callable[[str, Outcome], None]], None] = run_locally,
) -> dict[str, Any]:
    """Run what is missing of a plan and write its scorecard; returns the scorecard.

    Args:
        announce: called when victim and folder have turned out to be right, before the first attack.
        run: runs attacks and tells of each how it ended: :func:`run_locally`, or Ray's.

    Raises:
        RayppError: the victim, the suite or the folder is not allowed; an attack that fails does not stop the others.
    """
    with open_plan(plan, resume=resume) as (plan, victim):
        announce(plan)
        failures: dict[str, str] = {}
        names = in_order(plan)
        jobs = [name for name in names if finished(plan, name) is None]
        if needs_judge(plan, victim):
            jobs.append(JUDGE)
        with GridDisplay(len(jobs), quiet=quiet, what="attacks") as display:

            def ended(name: str, outcome: Outcome) -> None:
                if "error" in outcome:
                    failures[name] = outcome["error"]
                    display.done(name, f"failed: {outcome['error']}")
                else:
                    display.done(name, _said(outcome["result"]))

            if jobs:
                run(plan, jobs, display, ended)
        card = scorecard(plan, victim, failures)
        if plan.spec.bundle is not None and not failures.keys() - {JUDGE}:
            _into_bundle(plan, card, quiet)
        return card


def overview(plan: Plan) -> list[tuple[str, str, str]]:
    """Each attack's name, threat level and what the attacker has, for printing before anything runs."""
    return [(n, ATTACKS.get(n).threat.name, ATTACKS.get(n).threat.meaning) for n in in_order(plan)]


def _said(result: Outcome) -> str:
    if not result:
        return "trained"
    if result["status"] != "done":
        return str(result["note"] or result["status"])
    return f"{share_found(result['scores']):.1%} found, SSIM {result['scores']['ssim']['mean']:.3f}"


def scorecard(plan: Plan, victim: Victim, failures: dict[str, str]) -> dict[str, Any]:
    """Put together what has been measured, write ``scorecard.json`` and ``scores.csv``, and return the first."""
    from safetensors.torch import load

    judge = load_judge(plan, victim)
    test = (victim.metrics or {}).get("test")
    at_chance = chance_error(test, len(victim.classes))
    attacks: dict[str, Any] = {}
    images: dict[str, Scores] = {}
    for name in in_order(plan):
        result = finished(plan, name)
        if result is None:
            kind = ATTACKS.get(name)
            attacks[name] = {
                "attack": name, "threat": kind.threat.name, "threat_meaning": kind.threat.meaning,
                "status": "failed", "note": failures.get(name, "not run"),
            }  # fmt: skip
            continue
        if result["status"] == "done":
            estimates = load(plan.folder(name).read("estimates.safetensors"))["estimates"]
            images[name] = measure(estimates, victim, judge)
            result["scores"] = summarise(images[name], plan.suite.seed)
            result["found"] = share_found(result["scores"])
            result |= _flatness(result)
        attacks[name] = result
    beside = {name: measure(made, victim, judge) for name, made in nulls(victim, plan.suite.seed).items()}
    null_scores = {name: summarise(scores, plan.suite.seed) for name, scores in beside.items()}
    for result in attacks.values():
        if result["status"] == "done":
            result["above_null"] = _above(result["scores"], null_scores)
    card = {
        "victim": victim.name,
        "label": victim.label,
        "keyed": victim.access.fresh is not None,
        "num_queries": len(victim.plain),
        "num_gallery": len(victim.gallery),
        "num_attacker_images": len(victim.access.images) if victim.access.images is not None else 0,
        "chance": 1 / len(victim.gallery),
        "accuracy": (test or {}).get("accuracy"),
        "accuracy_interval": (test or {}).get("accuracy_interval"),
        "at_chance": at_chance,
        "judge_accuracy": _judge_accuracy(judge, victim),
        "judge_note": failures.get(JUDGE, ""),
        **headline(attacks, at_chance=at_chance is not None),
        "attacks": attacks,
        "nulls": null_scores,
        "suite": plan.dump()["suite"],
        "environment": environment(),
    }
    plan.storage.write(SCORECARD, _json(card))
    plan.storage.write(SCORES, _csv(victim, images | {f"null: {k}": v for k, v in beside.items()}))
    plan.storage.write(EXAMPLES, _examples(plan, victim, images))
    return card


def _examples(plan: Plan, victim: Victim, images: dict[str, Scores]) -> bytes:
    """Pictures for reports: the first queries, and of each attack those that it recovered best."""
    from safetensors.torch import load, save

    found: dict[str, Tensor] = {}
    for name, scores in images.items():
        estimates = load(plan.folder(name).read("estimates.safetensors"))["estimates"]
        best = scores["ssim_invariant"].argsort(descending=True)[:NUM_SHOWN]
        for what, chosen in (("first", torch.arange(min(NUM_SHOWN, len(estimates)))), ("worst", best)):
            at = chosen.to(victim.plain.device)
            found[f"{name}/{what}/plain"] = victim.plain[at].cpu()
            found[f"{name}/{what}/protected"] = victim.protected[at].cpu()
            found[f"{name}/{what}/estimate"] = estimates[chosen]
            found[f"{name}/{what}/psnr"] = scores["psnr"][chosen]
            found[f"{name}/{what}/ssim"] = scores["ssim"][chosen]
    found["plain"], found["protected"] = victim.plain[:NUM_SHOWN].cpu(), victim.protected[:NUM_SHOWN].cpu()
    return save({key: tensor.contiguous() for key, tensor in found.items()})


def headline(attacks: dict[str, Any], *, at_chance: bool) -> dict[str, Any]:
    """Give each attack its verdict, and return those of the strongest attack and the strongest that reconstructs.

    An attack that failed may have been the strongest: without it, ``holds`` and ``weak`` become ``inconclusive``.
    """
    for a in attacks.values():
        if a["status"] == "done":
            a["verdict"], a["verdict_reason"] = verdict(
                a["found"], a["num_queries"], lower_bound=a["lower_bound"], at_chance=at_chance
            )
    failed = [name for name, a in attacks.items() if a["status"] == "failed"]

    def of(name: str | None) -> tuple[str | None, str]:
        if name is None:
            return None, ""
        words, reason = attacks[name]["verdict"], attacks[name]["verdict_reason"]
        if failed and words in ("holds", "weak"):
            return INCONCLUSIVE, f"{', '.join(failed)} failed and may have found more"
        return words, reason

    worst_name = worst(attacks)
    drawing = worst({name: a for name, a in attacks.items() if ATTACKS.get(name).draws})
    (words, reason), (drawing_words, drawing_reason) = of(worst_name), of(drawing)
    red = worst_name is not None and attacks[worst_name]["found"] > RED
    return {
        "worst_attack": worst_name,
        "worst_drawing": drawing,
        "found_by_drawing": attacks[drawing]["found"] if drawing else None,
        "verdict_by_drawing": drawing_words,
        "verdict_reason_by_drawing": drawing_reason,
        "found": attacks[worst_name]["found"] if worst_name else None,
        "verdict": words,
        "verdict_reason": reason,
        "lower_bound": any(a.get("lower_bound") for a in attacks.values()) and not red,
    }


def _flatness(result: Outcome) -> Outcome:
    """Whether a trained attack's score is its last word, by the points of its curve."""
    trained, tried = bool(result["history"]), ATTACKS.get(result["attack"]).effort is not None
    if not trained and not tried:
        return {"lower_bound": False, "rises_with": [], "unknown": []}
    points = {point["what"]: point for point in result["curve"]}
    wanted = (("epochs", HALF_EPOCHS), ("images", QUARTER)) if trained else (("steps", HALF_EFFORT),)
    rising, unknown = [], []
    for what, before in wanted:
        if before not in points or result["num_queries"] < MIN_QUERIES:
            unknown.append(what)
        elif still_rising([points[before], points["everything"]]):
            rising.append(what)
    return {"lower_bound": bool(rising or unknown), "rises_with": rising, "unknown": unknown}


def _above(scores: dict[str, dict[str, float]], null_scores: dict[str, Any]) -> bool:
    """Whether the reconstructions resemble the originals more than what the class alone tells, beyond chance."""
    null = null_scores.get("class mean") or null_scores["mean image"]
    return any(scores[key]["low"] > null[key]["high"] for key in ("ssim_invariant", "edges", "reidentified"))


def _judge_accuracy(judge: nn.Module | None, victim: Victim) -> float | None:
    if judge is None:
        return None
    return float(measure(victim.plain, victim, judge)["accuracy"].mean())


# The judge: a plain classifier that has nothing to do with the victim


def needs_judge(plan: Plan, victim: Victim) -> bool:
    """Whether a plain classifier has still to be trained."""
    possible = victim.plain_classifier is None and victim.config is not None and bool(victim.classes)
    return possible and plan.suite.judge_epochs > 0 and not plan.storage.exists(f"{JUDGE}/summary.json")


def judge_config(plan: Plan, victim: Victim) -> Config:
    """How the plain classifier is trained: on the victim's data, as its classifier was, for the suite's epochs."""
    assert victim.config is not None
    tree = victim.config.model_dump(mode="json")
    tree |= {"protection": {"name": "plain"}, "adaptation": "auto", "seed": plan.suite.seed}
    tree["train"] |= {"mode": "plain", "epochs": plan.suite.judge_epochs, "plain_epochs": None}
    if tree["train"]["schedule"]["name"] == "multistep":
        tree["train"]["schedule"] = {"name": "one_cycle"}
    tree["data"] |= {"stream": False}
    tree["cluster"] |= {"storage": plan.storage.uri}
    return Config.model_validate(tree)


def train_judge(plan: Plan, victim: Victim, display: Shows) -> None:
    """Train the plain classifier as a run of its own, from where it was stopped."""
    config = judge_config(plan, victim)
    begun = plan.storage.exists(f"{JUDGE}/config.yaml")
    with open_run(config, JUDGE, resume=begun) as run:
        train_locally(run, display, victim.access.device)


def load_judge(plan: Plan, victim: Victim) -> nn.Module | None:
    """The plain classifier, or None where there is none."""
    if victim.plain_classifier is not None:
        return victim.plain_classifier
    folder = plan.storage.folder(JUDGE)
    if not folder.exists("summary.json"):
        return None
    return bundles.load_private(folder.folder("bundle").uri).classifier.to(victim.plain.device)


def _into_bundle(plan: Plan, card: dict[str, Any], quiet: bool) -> None:
    """Keep trained networks and scorecard in the bundle's private part, for serving."""
    assert plan.spec.bundle is not None
    try:
        with one_at_a_time(Storage(plan.spec.bundle)):  # what is read is what the new one takes the place of
            _merge_into_bundle(plan, card)
    except StorageError as error:
        if not quiet:
            Display().warn(f"the bundle keeps no scorecard: {error}")


def _merge_into_bundle(plan: Plan, card: dict[str, Any]) -> None:
    from safetensors.torch import load

    assert plan.spec.bundle is not None
    files = {name: plan.storage.read(name) for name in (SCORES, EXAMPLES)}
    card, files, kept = _with_stored(plan.spec.bundle, card, files)
    networks = {}
    for options in plan.suite.attacks:
        if options.name in kept:
            continue
        folder = plan.folder(options.name)
        if folder.exists("network.safetensors"):
            networks[options.name] = (options.model_dump(mode="json"), load(folder.read("network.safetensors")))
    bundles.add_attacks(plan.spec.bundle, networks, card, files)


def _with_stored(
    bundle: str, card: dict[str, Any], files: dict[str, bytes]
) -> tuple[dict[str, Any], dict[str, bytes], set[str]]:
    """A scorecard together with what the bundle keeps already: of each attack the run that found more.

    A weaker attack afterwards must not make a bundle look better. Gives the names of attacks whose earlier run is kept.
    """
    from safetensors.torch import load, save

    private = Storage(bundle).folder("private")
    if not private.exists(SCORECARD):
        return card, files, set()
    before = json.loads(private.read(SCORECARD))
    attacks = dict(card["attacks"])
    kept: set[str] = set()
    for name, was in before["attacks"].items():
        now = attacks.get(name)
        if was["status"] == "done" and (now is None or now["status"] != "done" or strength(was) > strength(now)):
            attacks[name], kept = was, kept | {name}
        elif now is None:
            attacks[name] = was
    base, other = (card, before) if card["num_queries"] >= before["num_queries"] else (before, card)
    # What a card measured on fewer images says of its own attacks stays true; nulls are those of more images.
    merged = other | base | {"attacks": attacks} | headline(attacks, at_chance=card["at_chance"] is not None)
    rows: list[list[str]] = []
    tables = [list(csv.reader(io.StringIO(text.decode()))) for text in (files[SCORES], private.read(SCORES))]
    names = list(dict.fromkeys(name for table in tables for name in table[0]))
    for table, of_before in zip(tables, (False, True), strict=True):
        for row in table[1:]:
            cells = dict(zip(table[0], row, strict=True))
            of_stored = base is before if row[0].startswith("null: ") else row[0] in kept
            if of_stored == of_before:
                rows.append([cells.get(name, "") for name in names])
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    pictures = load(files[EXAMPLES])
    pictures |= {k: v for k, v in load(private.read(EXAMPLES)).items() if k.partition("/")[0] in kept}
    return merged, {SCORES: text.getvalue().encode(), EXAMPLES: save(pictures)}, kept


def _csv(victim: Victim, images: dict[str, Scores]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    names = list(dict.fromkeys(metric for scores in images.values() for metric in scores))
    writer.writerow(["attack", "image", "label", *names])
    places, labels = victim.truth.tolist(), victim.labels.tolist()
    for attack_name, scores in images.items():
        columns: list[Tensor | None] = [scores.get(name) for name in names]
        for i in range(len(next(iter(scores.values())))):
            numbers = ["" if column is None else f"{float(column[i]):.5g}" for column in columns]
            writer.writerow([attack_name, places[i], labels[i], *numbers])
    return text.getvalue().encode()


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1) + "\n").encode()
