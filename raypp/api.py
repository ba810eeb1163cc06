"""The Python API: the commands of ``raypp`` as functions. The command line calls the same functions.

Settings may come as nested dictionaries, as dotted strings (``"train.epochs=4"``), and as keyword arguments by the last
part of their key (``epochs=4``), where only one setting has that name.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raypp.attacks import ATTACKS
from raypp.bundle.locate import locate_bundle
from raypp.config.overrides import Settings, resolve_keywords
from raypp.config.presets import Files, load_tree
from raypp.dispatch import as_list, default_suite, import_from_ray, run_name, split_folder, training_config, uses_ray
from raypp.loaded_bundle import Bundle
from raypp.result import Evaluation
from raypp.results import RunResult, Scorecard, SearchResult, Table1
from raypp.serve.publication import publisher
from raypp.utils.errors import ConfigError
from raypp.utils.signals import stop_on_signal
from raypp.utils.storage import Storage

if TYPE_CHECKING:
    from raypp.attacks.array_target import ArrayTarget
    from raypp.attacks.target import Target
    from raypp.config.schema import Config
    from raypp.experiments.attack_plan import AttackPlan


def train(
    preset: str | Path = "quickstart",
    settings: Settings = (),
    *,
    out: str | Path | None = None,
    name: str | None = None,
    storage: str | Path | None = None,
    config: Files = (),
    resume: bool = False,
    ray: bool | None = None,
    track: str | Sequence[str] = (),
    publish: str | Path | None = None,
    quiet: bool = False,
    **keywords: Any,
) -> RunResult:
    """Train a protection with its classifier, evaluate it and export the bundle.

    Args:
        preset: name of a preset (:func:`list_presets`) or path of a YAML file.
        settings: settings that override the preset and the files.
        out: the run's folder, a path or URI such as ``runs/first``, in place of ``name`` and ``storage``.
        name: the run's name, a new folder in ``storage``; by default made of preset, date and time.
        storage: folder or URI of runs; by default ``cluster.storage``, which is ``runs``.
        config: YAML files whose settings override the preset.
        resume: continue the run ``name`` or ``out`` from its newest intact checkpoint.
        ray: True trains on Ray Train, False in this process; None uses Ray where more than one process trains.
        track: trackers that receive settings and metrics: ``tensorboard``, ``mlflow``, ``wandb``.
        publish: model repository that gets the bundle at the end; checked before the start.
        quiet: print nothing but warnings.
        **keywords: settings by the last part of their key.

    Raises:
        RayppError: a setting, the data or the storage is not usable, or training diverges.
        TrainingInterrupted: SIGTERM; a checkpoint is saved.
    """
    if out is not None:
        name, storage = split_folder(out, name=name, storage=storage)
    merged = training_config(preset, settings, storage=storage, config=config, **keywords)
    name = run_name(name, preset, merged.cluster.storage, resume=resume, what="run")
    publish_bundle = publisher(publish)
    run = train_config(merged, name, resume=resume, ray=ray, track=track, quiet=quiet)
    publish_bundle(run.path)
    return run


def train_config(
    config: Config, name: str, *, resume: bool = False, ray: bool | None = None, track: str | Sequence[str] = (),
    quiet: bool = False,
) -> RunResult:  # fmt: skip
    """Train a run with a validated configuration, see :func:`train`."""
    from raypp.experiments.run_folder import point_latest
    from raypp.experiments.tracking import check_trackers, track_run
    from raypp.experiments.training_run import open_run, summary, train_locally
    from raypp.utils.progress import ProgressDisplay

    check_trackers(as_list(track))
    on_ray = uses_ray(ray, config.cluster, stream=config.data.stream)
    train_on_ray = import_from_ray("raypp.cluster.train", "train_on_ray") if on_ray else None
    with open_run(config, name, resume=resume) as run, ProgressDisplay(quiet=quiet) as display:
        for warning in run.warnings:
            display.warn(warning)
        results = summary(run)
        if results is None:
            with track_run(as_list(track), run, name, display) as progress:
                if train_on_ray is None:
                    with stop_on_signal(display.stop, signal.SIGTERM):
                        results = train_locally(run, progress)
                else:
                    results = train_on_ray(run, progress)
                progress.results(results)
            point_latest(run.storage)
        elif not quiet:
            display.console.print(f"run {name!r} is finished: nothing left to train", markup=False, highlight=False)
        return RunResult(results, run.storage.uri)


def attack(
    target: Any = None,
    suite: str | None = None,
    settings: Settings = (),
    *,
    attacks: str | Sequence[str] = (),
    function: str | None = None,
    folders: tuple[str, str] | None = None,
    preset: str | None = None,
    images: Any = None,
    labels: Any = None,
    attacker_images: Any = None,
    attacker_labels: Any = None,
    classifier: Any = None,
    key_generator: Callable[[], Any] | None = None,
    differentiable: bool = False,
    name: str | None = None,
    storage: str | Path = "runs",
    resume: bool = False,
    ray: bool | None = None,
    quiet: bool = False,
    **keywords: Any,
) -> Scorecard:
    """Run the attacks of a suite and write a scorecard and a report.

    Args:
        target: a bundle, a run, or a location of one (:class:`raypp.Bundle`); or a protection: a function from and to
            NumPy uint8 (N, H, W, C), or a ``torch.nn.Module`` from and to float (N, C, H, W) in [0, 1], which the white
            box differentiates.
        suite: ``quick``, ``small``, ``standard`` or path of a YAML file; default: ``quick``, with a GPU ``small``.
        settings: settings of the suite (``num_queries``), of attacks (``inverse.width``) and of a bundle's images.
        attacks: names of attacks to run (:func:`list_attacks`); empty runs the whole suite.
        function: ``MODULE:NAME`` or ``FILE.py:NAME`` of a function, in place of ``target``; ``preset`` names images.
        folders: a folder of plain images and one of protected images with the same names, in place of ``target``.
        images: plain images uint8 (N, H, W, C) for a function or module: the gallery, which holds the originals.
        labels: their classes (N,); without them attacks that need classes do not apply.
        attacker_images: the attacker's own images uint8 (M, H, W, C), with ``attacker_labels``. Without them half of
            ``images``, drawn by the suite's seed, becomes the attacker's.
        classifier: reads protected images: a function from NumPy uint8 (N, H, W, C) to classes (N,), in the values of
            ``labels``, or a module from float (N, C, H, W) to logits.
        key_generator: returns a new key. The protection is then called with images and a key, and attackers with
            knowledge of the algorithm (T2) use keys of their own.
        differentiable: the function maps torch float (N, C, H, W) in [0, 1] to the same, and the white box
            differentiates it, as a module.
        name: the attack run's name, a new folder in ``storage``; by default made of date and time.
        resume: continue the attack run ``name``; finished attacks are not repeated.
        ray: True runs attacks as Ray tasks, False in this process; None uses Ray where more than one process gains.
        quiet: print nothing but warnings.
        **keywords: settings of the suite, and attacks with a dictionary of their options.

    Raises:
        RayppError: a setting or the target is not usable. An attack that fails does not stop the others.
    """
    name = run_name(name, "attack", storage, resume=resume, what="attack run")
    target = _with_arrays(
        target, images=images, labels=labels, attacker_images=attacker_images, attacker_labels=attacker_labels,
        classifier=classifier, key_generator=key_generator, differentiable=differentiable,
    )  # fmt: skip
    plan = attack_plan(
        target, suite, settings, attacks=attacks, function=function, folders=folders, preset=preset, name=name,
        storage=storage, **keywords,
    )  # fmt: skip
    return run_attacks(plan, resume=resume, ray=ray, quiet=quiet)


def _with_arrays(target: Any, **arrays: Any) -> Any:
    """Add the arrays of :func:`attack` to a function or module; other targets have none."""
    if target is not None and not isinstance(target, Bundle | RunResult | str | Path):
        from raypp.attacks.array_target import ArrayTarget

        return ArrayTarget(target, **arrays)
    names = [name for name, value in arrays.items() if value is not None and value is not False]
    if names:
        raise ConfigError(f"{names[0]} belongs to a function or module as target; a bundle brings its own")
    return target


def attack_plan(
    target: Bundle | RunResult | ArrayTarget | str | Path | None = None,
    suite: str | None = None,
    settings: Settings = (),
    *,
    name: str | None = None,
    storage: str | Path = "runs",
    attacks: str | Sequence[str] = (),
    function: str | None = None,
    folders: tuple[str, str] | None = None,
    preset: str | None = None,
    **keywords: Any,
) -> AttackPlan:
    """Validate the settings of :func:`attack`, for a target with its arrays."""
    from raypp.attacks.suite import Suite
    from raypp.experiments.attack_plan import make_attack_plan

    if keywords:
        known: dict[str, Any] = dict.fromkeys((*Suite.model_fields, *ATTACKS, "data"))
        settings = resolve_keywords(settings, keywords, known)
    if isinstance(target, Bundle | RunResult):
        target = target.path
    return make_attack_plan(
        bundle=str(target) if isinstance(target, str | Path) else None,
        arrays=None if isinstance(target, str | Path) else target,
        function=function,
        folders=folders,
        preset=preset,
        suite=default_suite() if suite is None else suite,
        attacks=as_list(attacks),
        flags=settings,
        storage=storage,
        name=run_name(name, "attack", storage, resume=False, what="attack run"),
    )


def run_attacks(
    plan: AttackPlan,
    *,
    resume: bool = False,
    ray: bool | None = None,
    quiet: bool = False,
    announce: Callable[[AttackPlan, Target], None] = lambda *_: None,
) -> Scorecard:
    """Run a plan's attacks, see :func:`attack`; ``announce`` gets the opened plan and its target before the first."""
    from raypp.evaluation.report.render import write_report
    from raypp.experiments.attack_run import run_attack_suite

    if plan.arrays is not None and ray:
        raise ConfigError("functions and modules of this process are attacked in this process; leave ray out")
    on_ray = plan.arrays is None and uses_ray(ray, plan.suite.cluster)
    run = import_from_ray("raypp.cluster.attack", "run_on_ray") if on_ray else None
    card = run_attack_suite(plan, resume=resume, quiet=quiet, announce=announce, run=run)
    write_report([plan.storage.uri], plan.storage)
    return Scorecard(card, plan.storage.uri)


def evaluate(
    bundle: Bundle | RunResult | str | Path, settings: Settings = (), *, split: str = "test", jpeg: int | None = None
) -> Evaluation:
    """Measure a bundle's accuracy after 8-bit rounding, and the similarity of protected to plain images.

    Args:
        bundle: a bundle or a run, or a location of one (:class:`raypp.Bundle`).
        settings: settings of its images (``data.source.path``).
        split: ``test``, ``val`` or ``train``.
        jpeg: also measure the accuracy after JPEG compression with this quality, 1 to 100.
    """
    from raypp.evaluation.evaluate import evaluate_bundle

    location = locate_bundle(bundle if isinstance(bundle, str | Path) else bundle.path)
    return Evaluation(evaluate_bundle(location, settings, split, jpeg), location)


def table1(
    presets: str | Sequence[str] = "quickstart",
    methods: str | Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    settings: Settings = (),
    *,
    name: str | None = None,
    storage: str | Path = "runs",
    resume: bool = False,
    ray: bool | None = None,
    quiet: bool = False,
) -> Table1:
    """Train the grid of the paper's Table I and write it as CSV, Markdown and a figure.

    Args:
        presets: presets or paths of YAML files; the paper's are ``cifar10`` and ``cifar100``: days on one GPU.
        methods: rows of the table, such as ``alpha-0.005``; None for all.
        seeds: seeds of each row.
        settings: settings that override each preset.

    Raises:
        RayppError: grid or folder is invalid. A run that fails does not stop the others; :attr:`Table1.values` lists
            the errors under ``failed``.
    """
    from raypp.config.schema import Cluster
    from raypp.experiments import table1 as table
    from raypp.experiments.table1_grid import table_rows

    name = run_name(name, "table1", storage, resume=resume, what="table")
    on_ray = uses_ray(ray, Cluster())
    run = import_from_ray("raypp.cluster.tasks", "train_cells") if on_ray else table.run_cells_locally
    results = table.table1(
        as_list(presets), list(table_rows()) if methods is None else as_list(methods), seeds, settings,
        storage=storage, name=name, resume=resume, quiet=quiet, run=run,
    )  # fmt: skip
    rows = [result.to_dict() for result in results]
    failed = [sentence for result in results for sentence in result.failed]
    return Table1({"rows": rows, "failed": failed}, Storage(storage).folder(name).uri)


def tune(
    preset: str | Path,
    settings: Settings = (),
    *,
    name: str | None = None,
    storage: str | Path = "runs",
    config: Files = (),
    resume: bool = False,
    track: str | Sequence[str] = (),
    publish: str | Path | None = None,
    quiet: bool = False,
    **keywords: Any,
) -> SearchResult:
    """Search a preset's settings for accuracy and privacy on Ray Tune, and attack and export the best bundles.

    Args:
        preset: name or path of a preset with a section ``search``.
        settings: settings of the runs and, under ``search``, of the search.
        track: trackers that receive each trial's settings and metrics, see :func:`train`.
        publish: model repository that gets the bundle of the knee at the end; checked before the start.
        **keywords: settings by the last part of their key, such as ``num_trials=8``.
    """
    from raypp.experiments.search import make_search_plan

    name = run_name(name, f"tune-{Path(preset).stem}", storage, resume=resume, what="search")
    if keywords:
        from raypp.experiments.search import Search

        tree = load_tree(preset, config, settings, more=("search",))
        known = {"search": dict.fromkeys(Search.model_fields)}
        settings = resolve_keywords(settings, keywords, tree | {"search": known["search"] | tree.get("search", {})})
    plan = make_search_plan(str(preset), config, settings, storage=str(storage), name=name)
    run_search = import_from_ray("raypp.cluster.tune", "run_search", "a search needs it")
    publish_bundle = publisher(publish)
    search = SearchResult(run_search(plan, resume=resume, track=as_list(track), quiet=quiet), plan.storage.uri)
    publish_bundle(search.path)
    return search


def load(location: str | Path, key: str | Path | None = None) -> Bundle:
    """Load a bundle, see :class:`raypp.Bundle` for its locations."""
    return Bundle(location, key)


def protect(bundle: Bundle | str | Path, images: Any, key: str | Path | None = None) -> np.ndarray:
    """Protect images with the public part of a bundle, see :meth:`raypp.Bundle.protect`."""
    return (bundle if isinstance(bundle, Bundle) else Bundle(bundle, key)).protect(images)
