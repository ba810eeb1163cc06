"""Commands that train: train, quickstart, tune, table1; and config."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from raypp.cli.app import SETTINGS_HELP, First, Settings, app, import_from_ray, new_name, preset_and_flags
from raypp.cli.attack import run_attacks
from raypp.cli.render import print_chance_error, print_results, print_search, print_table1
from raypp.utils import runtime
from raypp.utils.errors import ConfigError, RayppError
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

    Parameters
    ----------
    preset
        Name of a preset (see `raypp config`), or the path of a YAML file.
    name
        The run's name, a new folder under cluster.storage; by default preset, date and time.
    config
        YAML file laid over the preset.
    resume
        Continue the run NAME from its newest sound checkpoint.
    local
        Train in this process, without Ray.
    quiet
        Print nothing but warnings and errors.
    """
    from raypp.config.presets import load_config

    preset, flags = preset_and_flags(preset, settings)
    merged = load_config(preset, config, flags)
    if resume and name is None:
        raise ConfigError("--resume needs --name, the run to continue")
    return run_training(merged, new_name(preset) if name is None else name, resume=resume, local=local, quiet=quiet)


def run_training(
    config: Config, name: str, *, resume: bool = False, local: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train a run and print what came of it; returns its summary."""
    from raypp.experiments.run_folder import point_latest
    from raypp.experiments.training_run import open_run, summary, train_locally
    from raypp.metrics.statistics import chance_error
    from raypp.utils.progress import ProgressDisplay

    on_ray = None if local else import_from_ray("raypp.cluster.train", "train_on_ray")
    with open_run(config, name, resume=resume) as run, ProgressDisplay(quiet=quiet) as display:
        for warning in run.warnings:
            display.warn(warning)
        found = summary(run)
        if found is not None:
            if not quiet:
                display.console.print(f"run {name!r} is finished: nothing left to train", markup=False, highlight=False)
        else:
            if on_ray is None:
                with stop_on_signal(display.stop, signal.SIGTERM):
                    found = train_locally(run, display)
            else:
                found = on_ray(run, display)
            point_latest(run.storage)
        where = run.storage.uri
    if not quiet:
        print_results(found, where)
    num_classes = len(found["classes"])
    print_chance_error(chance_error(found["plain_test"], num_classes, "plain images"))
    print_chance_error(chance_error(found["test"], num_classes))
    return found


@app.command
def quickstart(*, local: bool = False, name: str | None = None, storage: Path = Path("runs")) -> None:
    """Train on embedded pictures of shapes and attack the result, in minutes on two cores: a first look at everything.

    Parameters
    ----------
    local
        Train in this process, without Ray.
    name
        The run's name; by default quickstart, date and time.
    storage
        Folder under which the run gets its own.
    """
    from rich.markup import escape

    from raypp.config.presets import load_config
    from raypp.experiments.attack_plan import make_attack_plan

    console = Console()
    # One worker with all of this machine: where cores are few, every further process costs ten seconds to start.
    alone = not os.environ.get("RAY_ADDRESS")
    cores = ["--cluster.num_workers", "1", "--cluster.cpus_per_worker", str(runtime.num_cores())] if alone else []
    merged = load_config("quickstart", flags=["--cluster.storage", str(storage), *cores])
    name = new_name("quickstart") if name is None else name
    run_training(merged, name, local=local)
    where = storage / name
    console.print("\n[bold]What an attacker gets out of it[/]")
    plan = make_attack_plan(bundle=str(where / "bundle"), suite="quick", name="attack", storage=str(where))
    run_attacks(plan, local=True)  # a minute's work: starting Ray again would cost as much
    console.print("\n[bold]Next[/]")
    for command, why in (
        (f"raypp protect {where}/bundle/public IMAGE_OR_FOLDER OUT", "what a client does, offline"),
        (f"raypp evaluate {where}/bundle", "measure the bundle again, from its files alone"),
        (f"raypp attack {where}/bundle", "every attack, larger"),
        ("raypp train cifar10-small", "real images: downloads CIFAR-10 (or --data.source parquet)"),
        ("raypp config cifar10", "the paper's experiment, every number of it"),
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
    """Train the grid of the paper's Table I, run beside run, and write it as CSV, Markdown and a figure.

    Parameters
    ----------
    datasets
        Presets, or paths of YAML files; by default cifar10 and cifar100, the paper's own (for GPUs).
    methods
        Rows of the table, by default all: see the message about an unknown one.
    seeds
        Seeds of each row, by default 0.
    name
        The table's name, a new folder under the storage path.
    storage
        Folder or URI under which the table gets its own.
    resume
        Go on with the table NAME: what is finished is not trained again; rows and seeds may be added.
    local
        Train in this process, one run after the other, without Ray.
    quiet
        Print nothing but warnings and errors.
    """
    from raypp.experiments import table1 as table
    from raypp.experiments.table1_grid import table_rows

    run = table.run_cells_locally if local else import_from_ray("raypp.cluster.table1", "run_on_ray")
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
    failed = [sentence for result in results for sentence in result.failed]
    if failed:
        raise RayppError(f"{len(failed)} of the runs failed; --resume tries them again")
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
    """Search a preset's settings for accuracy and privacy at once, and hand over the best bundles, attacked.

    Parameters
    ----------
    preset
        Name of a preset with a section `search` (see `raypp config`), or the path of a YAML file; settings of the
        search are flags too, such as --search.num_trials 8.
    name
        The search's name, a new folder under the storage path; by default tune, preset, date and time.
    config
        YAML file laid over the preset.
    storage
        Folder or URI under which it gets its own.
    resume
        Go on with the search NAME: no finished trial runs again.
    quiet
        Print nothing but warnings and errors.
    """
    from raypp.experiments.search import make_search_plan

    if resume and name is None:
        raise ConfigError("--resume needs --name, the search to continue")
    preset, flags = preset_and_flags(preset, settings)
    name = f"tune-{new_name(preset)}" if name is None else name
    file = None if config is None else str(config)
    plan = make_search_plan(preset, file, flags, storage=storage, name=name)
    found: dict[str, Any] = import_from_ray("raypp.cluster.tune", "run_search", "a search needs it")(
        plan, resume=resume, quiet=quiet
    )
    if not quiet:
        print_search(found, plan.storage.uri)
    return found


@app.command
def config(
    preset: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *settings: Settings,
    file: Annotated[Path | None, Parameter(name="--config")] = None,
) -> None:
    """Print a preset's whole configuration, or list the presets.

    Parameters
    ----------
    preset
        Name of a preset or path of a YAML file.
    file
        YAML file laid over the preset.
    """
    import yaml

    from raypp.config.presets import load_config, load_tree, presets

    console = Console()
    if preset is None:
        for name, path in presets().items():
            first = path.read_text().splitlines()[0].lstrip("# ")
            console.print(f"{name:<16} {first}", highlight=False, soft_wrap=True)
        return
    preset, flags = preset_and_flags(preset, settings)
    sys.stdout.write(load_config(preset, file, flags).to_yaml())
    if (search := load_tree(preset, file, flags, more=("search",)).get("search")) is not None:
        sys.stdout.write(yaml.safe_dump({"search": search}, sort_keys=False))
