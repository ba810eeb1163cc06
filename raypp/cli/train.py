"""Commands train, quickstart, table1, tune and config."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from raypp.cli.app import SETTINGS_HELP, First, Settings, app, import_from_ray, preset_and_flags, run_name
from raypp.cli.attack import run_attacks
from raypp.cli.render import print_chance_error, print_results, print_search, print_table1
from raypp.utils import runtime
from raypp.utils.errors import RayppError
from raypp.utils.signals import stop_on_signal

if TYPE_CHECKING:
    from raypp.config.schema import Config


@app.command(help_epilogue=SETTINGS_HELP)
def train(
    preset: First,
    *settings: Settings,
    name: str | None = None,
    config: Path | None = None,
    resume: bool = False,
    local: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a protection with its classifier and export the bundle.

    Args:
        preset: Name of a preset (see `raypp config`), or the path of a YAML file.
        name: The run's name, a new folder under cluster.storage; by default preset, date and time.
        config: YAML file whose settings override the preset.
        resume: Continue the run NAME from its newest intact checkpoint.
        local: Train in this process, without Ray.
        quiet: Print nothing but warnings and errors.
    """
    from raypp.config.presets import load_config

    preset, flags = preset_and_flags(preset, settings)
    merged = load_config(preset, config, flags)
    name = run_name(name, Path(preset).stem, resume=resume)
    return run_training(merged, name, resume=resume, local=local, quiet=quiet)


def run_training(
    config: Config, name: str, *, resume: bool = False, local: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train a run, print its results and return its summary."""
    from raypp.experiments.run_folder import point_latest
    from raypp.experiments.training_run import open_run, summary, train_locally
    from raypp.metrics.statistics import chance_error
    from raypp.utils.progress import ProgressDisplay

    train_on_ray = None if local else import_from_ray("raypp.cluster.train", "train_on_ray")
    with open_run(config, name, resume=resume) as run, ProgressDisplay(quiet=quiet) as display:
        for warning in run.warnings:
            display.warn(warning)
        results = summary(run)
        if results is None:
            if train_on_ray is None:
                with stop_on_signal(display.stop, signal.SIGTERM):
                    results = train_locally(run, display)
            else:
                results = train_on_ray(run, display)
            point_latest(run.storage)
        elif not quiet:
            display.console.print(f"run {name!r} is finished: nothing left to train", markup=False, highlight=False)
        where = run.storage.uri
    if not quiet:
        print_results(results, where)
    num_classes = len(results["classes"])
    print_chance_error(chance_error(results["plain_test"], num_classes, "plain images"))
    print_chance_error(chance_error(results["test"], num_classes))
    return results


@app.command
def quickstart(*, local: bool = False, name: str | None = None, storage: Path = Path("runs")) -> None:
    """Train on generated pictures of shapes and attack the bundle, in minutes on two cores.

    Args:
        local: Train in this process, without Ray.
        name: The run's name; by default quickstart, date and time.
        storage: Folder that holds the run's folder.
    """
    from rich.markup import escape

    from raypp.config.presets import load_config
    from raypp.experiments.attack_plan import make_attack_plan

    console = Console()
    # One worker with all cores of this machine: each further process takes ten seconds to start.
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    cores = [] if on_cluster else ["--cluster.num_workers", "1", "--cluster.cpus_per_worker", str(runtime.num_cores())]
    merged = load_config("quickstart", flags=["--cluster.storage", str(storage), *cores])
    name = run_name(name, "quickstart")
    run_training(merged, name, local=local)
    where = storage / name
    console.print("\n[bold]Attacks on this bundle[/]")
    plan = make_attack_plan(bundle=str(where / "bundle"), suite="quick", name="attack", storage=str(where))
    run_attacks(plan, local=True)  # takes a minute, as long as starting Ray again
    console.print("\n[bold]Next[/]")
    for command, why in (
        (f"raypp protect {where}/bundle/public IMAGE_OR_FOLDER OUT", "protect images offline, as a client does"),
        (f"raypp evaluate {where}/bundle", "measure the bundle again from its files"),
        (f"raypp attack {where}/bundle", "all attacks, at a larger size"),
        ("raypp train cifar10-small", "real images: downloads CIFAR-10 (or --data.source parquet)"),
        ("raypp config cifar10", "all settings of the paper's experiment"),
        (f"raypp serve {storage}/latest/bundle", "classify over HTTP"),
    ):
        console.print(f"  {escape(command):<58} [dim]{why}[/]", highlight=False, soft_wrap=True)


@app.command(help_epilogue=SETTINGS_HELP)
def table1(
    *settings: Settings,
    datasets: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    methods: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    seeds: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    name: str = "table1",
    storage: str = "runs",
    resume: bool = False,
    local: bool = False,
    quiet: bool = False,
) -> list[Any]:
    """Train the grid of the paper's Table I in parallel and write it as CSV, Markdown and a figure.

    Args:
        datasets: Presets or paths of YAML files; by default cifar10 and cifar100, as in the paper (for GPUs).
        methods: Rows of the table, by default all; the error about an unknown row lists them.
        seeds: Seeds of each row, by default 0.
        name: The table's name, a new folder under the storage path.
        storage: Folder or URI that holds the table's folder.
        resume: Continue the table NAME: finished runs are not repeated, and rows and seeds may be added.
        local: Train in this process, one run after the other, without Ray.
        quiet: Print nothing but warnings and errors.
    """
    from raypp.experiments import table1 as table
    from raypp.experiments.table1_grid import table_rows

    run = table.run_cells_locally if local else import_from_ray("raypp.cluster.tasks", "train_cells")
    results = table.table1(
        ["cifar10", "cifar100"] if datasets is None else datasets,
        list(table_rows()) if methods is None else methods,
        [0] if seeds is None else seeds,
        settings,
        storage=storage,
        name=name,
        resume=resume,
        quiet=quiet,
        run=run,
    )
    if not quiet:
        print_table1(results, f"{storage}/{name}")
    if num_failed := sum(len(result.failed) for result in results):
        raise RayppError(f"{num_failed} of the runs failed; --resume tries them again")
    return results


@app.command(help_epilogue=SETTINGS_HELP)
def tune(
    preset: First,
    /,
    *settings: Settings,
    name: str | None = None,
    config: Path | None = None,
    storage: str = "runs",
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Search a preset's settings for accuracy and privacy, and attack and export the best bundles.

    Args:
        preset: Name of a preset with a section `search` (see `raypp config`), or the path of a YAML file; flags also
            set the search, such as --search.num_trials 8.
        name: The search's name, a new folder under the storage path; by default tune, preset, date and time.
        config: YAML file whose settings override the preset.
        storage: Folder or URI that holds the search's folder.
        resume: Continue the search NAME: finished trials are not repeated.
        quiet: Print nothing but warnings and errors.
    """
    from raypp.experiments.search import make_search_plan

    preset, flags = preset_and_flags(preset, settings)
    name = run_name(name, f"tune-{Path(preset).stem}", resume=resume, what="search")
    plan = make_search_plan(preset, config, flags, storage=storage, name=name)
    run_search = import_from_ray("raypp.cluster.tune", "run_search", "a search needs it")
    results: dict[str, Any] = run_search(plan, resume=resume, quiet=quiet)
    if not quiet:
        print_search(results, plan.storage.uri)
    return results


@app.command
def config(
    preset: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *settings: Settings,
    file: Annotated[Path | None, Parameter(name="--config")] = None,
) -> None:
    """Print a preset's whole configuration, or list the presets.

    Args:
        preset: Name of a preset or path of a YAML file.
        file: YAML file whose settings override the preset.
    """
    import yaml

    from raypp.config.presets import load_config, load_tree, presets

    console = Console()
    if preset is None:
        for name, path in presets().items():
            description = path.read_text().splitlines()[0].lstrip("# ")
            console.print(f"{name:<16} {description}", highlight=False, soft_wrap=True)
        return
    preset, flags = preset_and_flags(preset, settings)
    sys.stdout.write(load_config(preset, file, flags).to_yaml())
    if (search := load_tree(preset, file, flags, more=("search",)).get("search")) is not None:
        sys.stdout.write(yaml.safe_dump({"search": search}, sort_keys=False))
