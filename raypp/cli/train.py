"""Commands train, quickstart, table1 and tune."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from raypp.cli.app import (
    SETTINGS_HELP,
    START,
    TRAIN,
    AsJson,
    ConfigFiles,
    First,
    OnRay,
    Settings,
    Trackers,
    Words,
    app,
    epilogue,
    preset_and_flags,
    print_json,
    resumable,
    set_verbosity,
    without_settings,
)
from raypp.cli.attack import print_attack_results, print_threat_table
from raypp.cli.render import (
    print_chance_error,
    print_next_steps,
    print_plan,
    print_results,
    print_search,
    print_table1,
)
from raypp.cli.service import print_published, read_token
from raypp.utils import runtime
from raypp.utils.errors import ConfigError, RayppError
from raypp.utils.paths import shown_path
from raypp.utils.storage import Storage


@app.command(
    group=TRAIN,
    help_epilogue=epilogue(
        "train quickstart --name first",
        "train cifar10-small --train.alpha 0.01",
        "train cifar10-small --name first --resume",
        "train cifar10-small --publish runs/models",
        text=SETTINGS_HELP,
    ),
)
def train(
    preset: First,
    *settings: Settings,
    name: str | None = None,
    storage: str | None = None,
    config: ConfigFiles = None,
    resume: bool = False,
    ray: OnRay = None,
    track: Trackers = None,
    publish: str | None = None,
    url: str | None = None,
    token_file: Path | None = None,
    dry_run: bool = False,
    json: AsJson = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Train a protection with its classifier and export the bundle.

    Args:
        preset: Name of a preset (`raypp list presets`), or path of a YAML file.
        name: Name of the run, a new folder in the storage; default: preset, date and time.
        storage: Folder or URI that holds the run's folder; default: cluster.storage.
        config: YAML file with settings that override the preset; may be repeated.
        resume: Continue the run NAME from its newest intact checkpoint.
        ray: Train on Ray Train (--ray) or in this process (--local); default: Ray for more than one worker.
        track: Tracker of settings and metrics: tensorboard, mlflow or wandb; may be repeated.
        publish: Model repository that gets the bundle at the end (see `raypp publish`); checked before the start.
        url: With --publish: URL of a service of the repository; wait until it has switched to the bundle.
        token_file: With --url: file that holds a bearer token for that service.
        dry_run: Print the plan and an estimate of the time, and write nothing.
        json: Print the results as JSON on standard output.
        quiet: Print only warnings and errors.
        verbose: Also print the log lines of Ray and its workers; jobs on a cluster always do.
    """
    set_verbosity(verbose=verbose, quiet=quiet)
    from raypp import api
    from raypp.dispatch import run_name, training_config
    from raypp.metrics.statistics import chance_error

    preset, flags = preset_and_flags(preset, settings)
    merged = training_config(preset, flags, storage=storage, config=config or ())
    unique_name = run_name(name, preset, merged.cluster.storage, resume=resume, what="run")
    if dry_run:
        from raypp.experiments.estimate import estimate_training
        from raypp.experiments.run_folder import ensure_free, validate_name

        if name is not None and not resume:
            folder = Storage(merged.cluster.storage).folder(validate_name(name))
            if folder.exists():
                ensure_free(folder, name)
        print_plan(merged.to_yaml(), estimate_training(merged), json=json)
        return
    publish_bundle = _publisher(publish, url, token_file, quiet=quiet)
    with resumable(unique_name):
        run = api.train_config(merged, unique_name, resume=resume, ray=ray, track=track or (), quiet=quiet or json)
    print_run(run, json=json, quiet=quiet)
    publish_bundle(run.path)
    if not quiet and not json and chance_error(run.values["test"]) is None:
        print_next_steps((f"raypp attack {shown_path(run.path)}", "attack the bundle"))


def _publisher(
    repository: str | None, url: str | None, token_file: Path | None, *, quiet: bool
) -> Callable[[str], None]:
    """Check the options of a publication; returns a function that publishes the bundle of a run or a search."""
    if repository is None and (url or token_file) is not None:
        raise ConfigError(f"{'--url' if url is not None else '--token-file'} belongs to --publish REPOSITORY")
    from raypp.serve.publication import publisher

    announce = partial(print_published, Console(stderr=True, quiet=quiet))
    return publisher(repository, url=url, token=read_token(token_file), announce=announce)


def print_run(run: Any, *, json: bool, quiet: bool) -> None:
    """Print the results of a training, and an error line if a classifier is at chance."""
    from raypp.metrics.statistics import chance_error

    results = run.to_dict()
    if json:
        print_json({"path": run.path} | results)
    elif not quiet:
        print_results(results, run.path)
    num_classes = len(results["classes"])
    print_chance_error(chance_error(results["plain_test"], num_classes, "plain images"))
    print_chance_error(chance_error(results["test"], num_classes))


@app.command(
    group=START, help_epilogue=epilogue("quickstart", "quickstart --train.epochs 2 --quiet", text=SETTINGS_HELP)
)
def quickstart(
    *settings: Settings,
    name: str | None = None,
    storage: str = "runs",
    ray: OnRay = None,
    json: AsJson = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Train on generated pictures of shapes and attack the bundle, in minutes on two cores.

    Args:
        name: Name of the run; default: quickstart, date and time.
        storage: Folder or URI that holds the run's folder.
        ray: Train on Ray Train (--ray) or in this process (--local); default: Ray for more than one worker.
        json: Print the results as JSON on standard output.
        quiet: Print only warnings and errors.
        verbose: Also print the log lines of Ray and its workers; jobs on a cluster always do.
    """
    set_verbosity(verbose=verbose, quiet=quiet)
    from raypp import api
    from raypp.dispatch import new_name, training_config

    positional, flags = without_settings(settings)
    # One worker with all cores: each further process takes ten seconds to start.
    cores = {} if os.environ.get("RAY_ADDRESS") else {"num_workers": 1, "cpus_per_worker": runtime.num_cores()}
    merged = training_config("quickstart", [*positional, *flags], storage=storage, defaults={"cluster": cores})
    name = new_name("quickstart", storage) if name is None else name
    with resumable(name):
        run = api.train_config(merged, name, ray=ray, quiet=quiet or json)
    if not json:
        print_run(run, json=False, quiet=quiet)
        if not quiet:
            Console().print("\n[bold]Attacks on this bundle[/]")
    plan = api.attack_plan(run.bundle, "quick", name="attack", storage=run.path)
    announcement: dict[str, Any] = {} if quiet or json else {"announce": print_threat_table}
    card = api.run_attacks(plan, ray=False, quiet=quiet or json, **announcement)
    if json:
        print_json({"path": run.path, "training": run.to_dict(), "attack": card.to_dict()})
        return
    print_attack_results(card, json=False, quiet=quiet, client=False)  # printed with the training
    if not quiet:
        where = shown_path(run.path)
        print_next_steps(
            (f"raypp protect {where}/bundle/public IMAGE_OR_FOLDER OUTPUT", "protect images offline, as a client does"),
            (f"raypp evaluate {where}", "measure the bundle again from its files"),
            (f"raypp attack {where} --suite small", "stronger attacks, hours on two cores"),
            (f"raypp serve {where}", "classify over HTTP"),
            ("raypp train cifar10-small", "real images; downloads CIFAR-10"),
            ("raypp config cifar10 --explain", "the paper's experiment, every setting explained"),
        )


@app.command(
    group=TRAIN,
    help_epilogue=epilogue(
        "table1 --presets cifar10-small --methods plain alpha-0.005 --seeds 0 1 2",
        "table1 --presets cifar10 cifar100 --dry-run",
        text=SETTINGS_HELP,
    ),
)
def table1(
    *settings: Settings,
    presets: Words = None,
    methods: Words = None,
    seeds: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    name: str = "table1",
    storage: str = "runs",
    resume: bool = False,
    ray: OnRay = None,
    dry_run: bool = False,
    json: AsJson = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Train the grid of the paper's Table I and write it as CSV, Markdown and a figure.

    Args:
        presets: Presets or paths of YAML files; the paper's are cifar10 and cifar100, which take days on one GPU.
        methods: Rows of the table (`raypp list rows`); default: all.
        seeds: Seeds of each row; default: 0.
        name: Name of the table, a new folder in the storage.
        storage: Folder or URI that holds the table's folder.
        resume: Continue the table NAME: finished runs are not repeated, and rows and seeds may be added.
        ray: Train on Ray (--ray) or in this process (--local), one run after the other; default: Ray with several GPUs.
        dry_run: Print the runs and an estimate of the time, and write nothing.
        json: Print the table as JSON on standard output.
        quiet: Print only warnings and errors.
        verbose: Also print the log lines of Ray and its workers; jobs on a cluster always do.
    """
    set_verbosity(verbose=verbose, quiet=quiet)
    from raypp import api

    if not presets:
        raise ConfigError(
            "no preset is given; --presets takes names such as cifar10-small, or the paper's cifar10 and cifar100"
        )
    seeds = [0] if seeds is None else seeds
    if dry_run:
        from raypp.experiments.estimate import estimate_table

        print_plan(None, estimate_table(presets, methods, seeds, settings), json=json)
        return
    with resumable(name):
        table = api.table1(
            presets, methods, seeds, settings, name=name, storage=storage, resume=resume, ray=ray, quiet=quiet or json
        )
    if json:
        print_json({"path": table.path} | table.to_dict())
    elif not quiet:
        print_table1(table)
    for row in table.values["rows"]:
        for sentence in row["at_chance"]:
            print_chance_error(sentence)
    if failed := table.values["failed"]:
        raise RayppError(f"{len(failed)} of the runs failed; --resume tries them again")


@app.command(group=TRAIN, help_epilogue=epilogue("tune quickstart --search.num_trials 8", text=SETTINGS_HELP))
def tune(
    preset: First,
    /,
    *settings: Settings,
    name: str | None = None,
    storage: str = "runs",
    config: ConfigFiles = None,
    resume: bool = False,
    track: Trackers = None,
    publish: str | None = None,
    url: str | None = None,
    token_file: Path | None = None,
    dry_run: bool = False,
    json: AsJson = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Search a preset's settings for accuracy and privacy, and attack and export the best bundles.

    Args:
        preset: Name of a preset with a section `search`, or path of a YAML file; flags also set the search, such as
            --search.num_trials 8.
        name: Name of the search, a new folder in the storage; default: tune, preset, date and time.
        storage: Folder or URI that holds the search's folder.
        config: YAML file with settings that override the preset; may be repeated.
        resume: Continue the search NAME: finished trials are not repeated.
        track: Tracker of each trial's settings and metrics: tensorboard, mlflow or wandb; may be repeated.
        publish: Model repository that gets the knee's bundle (see `raypp publish`); checked before the start.
        url: With --publish: URL of a service of the repository; wait until it has switched to the bundle.
        token_file: With --url: file that holds a bearer token for that service.
        dry_run: Print the plan and an estimate of the time, and write nothing.
        json: Print the results as JSON on standard output.
        quiet: Print only warnings and errors.
        verbose: Also print the log lines of Ray and its workers; jobs on a cluster always do.
    """
    set_verbosity(verbose=verbose, quiet=quiet)
    from raypp import api
    from raypp.dispatch import run_name

    preset, flags = preset_and_flags(preset, settings)
    if dry_run:
        from raypp.experiments.estimate import estimate_search

        print_plan(None, estimate_search(preset, config or (), flags), json=json)
        return
    publish_bundle = _publisher(publish, url, token_file, quiet=quiet)
    name = run_name(name, f"tune-{Path(preset).stem}", storage, resume=resume, what="search")
    with resumable(name):
        search = api.tune(
            preset, flags, name=name, storage=storage, config=config or (), resume=resume, track=track or (),
            quiet=quiet or json,
        )  # fmt: skip
    if json:
        print_json({"path": search.path} | search.to_dict())
    elif not quiet:
        print_search(search.to_dict(), search.path)
    publish_bundle(search.path)
