"""The command line. Each command is a function of the same name; torch and Ray are imported when one needs them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, validators
from rich.console import Console

import raypp
from raypp.experiments import attack_plan, table1_grid
from raypp.utils import runtime
from raypp.utils.errors import FAILURE, USAGE, ConfigError, RayppError
from raypp.utils.signals import told_by

app = App(
    name="raypp",
    suppress_keyboard_interrupt=False,  # main says how to go on
    version=raypp.__version__,
    help="Train image protections with their classifiers on Ray, measure what they leak, and use them.",
)
data_app = App(name="data", help="Data sources: list them, convert them to Parquet, check their integrity.")
app.command(data_app)

if TYPE_CHECKING:
    from raypp.config.schema import Config
    from raypp.experiments.attack_plan import Plan
    from raypp.experiments.table1_results import Result

Settings = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
# What names the thing itself; settings may stand before it.
First = Annotated[str, Parameter(allow_leading_hyphen=True)]
SETTINGS_HELP = (
    "Any setting of the configuration is a flag: --train.alpha 0.01 --data.source.name parquet. "
    "`raypp config PRESET` prints them all with their values."
)

ATTACK_HELP = (
    "Any setting of the suite is a flag, as --num_queries 500, any of an attack by its name, as "
    "--inverse.train.epochs 5, and any of the images, as --data.source.path FOLDER."
)
TRACEBACK = "RAYPP_TRACEBACK"  # in the environment: errors show where they arose, too
TOLD_SECONDS = 10.0  # between two lines that say that a service does not answer


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

    preset, flags = _preset(preset, settings)
    merged = load_config(preset, config, flags)
    if resume and name is None:
        raise ConfigError("--resume needs --name, the run to continue")
    return run_training(merged, _new_name(preset) if name is None else name, resume=resume, local=local, quiet=quiet)


def run_training(
    config: Config, name: str, *, resume: bool = False, local: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train a run and print what came of it; returns its summary."""
    from raypp.experiments.run_folder import point_latest
    from raypp.experiments.training_run import open_run, summary, train_locally
    from raypp.metrics.statistics import chance_error
    from raypp.utils.progress import Display

    on_ray = None if local else _from_ray("raypp.cluster.train", "train_on_ray")
    with open_run(config, name, resume=resume) as run, Display(quiet=quiet) as display:
        for warning in run.warnings:
            display.warn(warning)
        found = summary(run)
        if found is not None:
            if not quiet:
                display.console.print(f"run {name!r} is finished: nothing left to train", markup=False, highlight=False)
        else:
            if on_ray is None:
                with told_by(display.stop, signal.SIGTERM):
                    found = train_locally(run, display)
            else:
                found = on_ray(run, display)
            point_latest(run.storage)
        where = run.storage.uri
    if not quiet:
        _print_results(found, where)
    num_classes = len(found["classes"])
    _print_chance_error(chance_error(found["plain_test"], num_classes, "plain images"))
    _print_chance_error(chance_error(found["test"], num_classes))
    return found


def _print_chance_error(sentence: str | None) -> None:
    """Print one red line on standard error, also with --quiet, if a classifier is at chance."""
    if sentence is not None:
        Console(stderr=True).print(f"error: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)


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
    from raypp.experiments import attack_run

    console = Console()
    # One worker with all of this machine: where cores are few, every further process costs ten seconds to start.
    alone = not os.environ.get("RAY_ADDRESS")
    cores = ["--cluster.num_workers", "1", "--cluster.cpus_per_worker", str(runtime.num_cores())] if alone else []
    merged = load_config("quickstart", flags=["--cluster.storage", str(storage), *cores])
    name = _new_name("quickstart") if name is None else name
    run_training(merged, name, local=local)
    where = storage / name
    console.print("\n[bold]What an attacker gets out of it[/]")
    plan = attack_plan.make_plan(bundle=str(where / "bundle"), suite="quick", name="attack", storage=str(where))
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

    run = table.run_locally if local else _from_ray("raypp.cluster.table1", "run_on_ray")
    results = table.table1(
        ["cifar10", "cifar100"] if datasets is None else datasets,
        list(table1_grid.methods()) if methods is None else methods,
        [0] if seeds is None else seeds,
        settings,
        storage=storage,
        name=name,
        resume=resume,
        quiet=quiet,
        run=run,
    )
    if not quiet:
        _print_table1(results, f"{storage}/{name}")
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
    from raypp.experiments.search import make_plan

    if resume and name is None:
        raise ConfigError("--resume needs --name, the search to continue")
    preset, flags = _preset(preset, settings)
    name = f"tune-{_new_name(preset)}" if name is None else name
    file = None if config is None else str(config)
    plan = make_plan(preset, file, flags, storage=storage, name=name)
    found: dict[str, Any] = _from_ray("raypp.cluster.tune", "run_search", "a search needs it")(
        plan, resume=resume, quiet=quiet
    )
    if not quiet:
        _print_search(found, plan.storage.uri)
    return found


@app.command(help_epilogue=ATTACK_HELP)
def attack(
    *bundle: Annotated[str, Parameter(allow_leading_hyphen=True)],
    function: str | None = None,
    preset: str | None = None,
    folders: tuple[str, str] | None = None,
    attacks: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    suite: str = "small",
    name: str | None = None,
    storage: str = "runs",
    resume: bool = False,
    local: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Attack a protection with everything that its threat levels allow, and write scorecard and report.

    Parameters
    ----------
    bundle
        Path or URI of a bundle to attack, where neither --function nor --folders names a victim; settings may stand
        before and after it.
    function
        Attack a protection of yours instead: MODULE:NAME or FILE.py:NAME of a function from and to NumPy uint8
        (N, H, W, C).
    preset
        Preset whose images a function is attacked on; by default cifar10-small.
    folders
        Attack pairs of images instead: a folder of plain ones, and one of protected ones of the same names.
    attacks
        Only these attacks, by default all of the suite.
    suite
        How strong: quick, small, standard, or the path of a YAML file.
    name
        The attack run's name, a new folder under the storage path; by default attack, date and time.
    storage
        Folder or URI under which it gets its own.
    resume
        Go on with the attack run NAME: what is finished is not run again; attacks may be added.
    local
        Attack in this process, one attack after the other, without Ray.
    quiet
        Print nothing but warnings and errors.
    """
    from raypp.experiments import attack_run

    if resume and name is None:
        raise ConfigError("--resume needs --name, the attack run to continue")
    bundles, settings = _without_settings(bundle)
    if len(bundles) > 1:
        raise ConfigError(
            f"name one bundle, found {' and '.join(map(repr, bundles))}; a setting is written --name VALUE"
        )
    plan = attack_plan.make_plan(
        bundle=bundles[0] if bundles else None,
        function=function,
        folders=folders,
        preset=preset,
        suite=suite,
        attacks=attacks or (),
        flags=settings,
        storage=storage,
        name=_new_name("attack") if name is None else name,
    )
    return run_attacks(plan, resume=resume, local=local, quiet=quiet)


def _preset(first: str, more: tuple[str, ...]) -> tuple[str, list[str]]:
    """The preset among a command's words, wherever it stands, and all others, which have to be settings."""
    others, settings = _without_settings((first, *more))
    if not others:
        raise ConfigError(f"no preset is given; `raypp config` lists them, and a setting such as {first} needs a value")
    return others[0], [*others[1:], *settings]


def _without_settings(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Split words into those that stand for themselves and settings, ``--name VALUE`` or ``--name=VALUE``."""
    others: list[str] = []
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            others.append(word)
            continue
        settings.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return others, settings


def run_attacks(plan: Plan, *, resume: bool = False, local: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run a plan's attacks, write report and scorecard, print and return the latter."""
    from raypp.evaluation.report.render import write_report
    from raypp.experiments import attack_run

    def announce(opened: Plan) -> None:
        if not quiet:
            _print_threats(attack_plan.overview(opened))

    run = attack_run.run_locally if local else _from_ray("raypp.cluster.attack", "run_on_ray")
    card = attack_run.attack(plan, resume=resume, quiet=quiet, announce=announce, run=run)
    write_report([plan.storage.uri], plan.storage)
    if not quiet:
        _print_scorecard(card, plan.storage.uri)
    _print_chance_error(card["at_chance"])
    failed = [name for name, found in card["attacks"].items() if found["status"] == "failed"]
    if failed:
        raise RayppError(f"{len(failed)} of the attacks failed ({', '.join(failed)}); --resume tries them again")
    return card


@app.command
def report(*sources: str, out: str = "report") -> None:
    """Put attack runs and attacked bundles into one HTML page with figures, CSV and JSON.

    Parameters
    ----------
    sources
        Attack runs (see `raypp attack`), or runs of `raypp train` and bundles that were attacked.
    out
        A new or empty folder, or one that holds an earlier report; a path or URI.
    """
    from raypp.evaluation.report.render import write_report
    from raypp.utils.storage import Storage

    target = Storage(out)
    write_report(sources, target)
    Console().print(f"{target.uri}/report.html", markup=False, highlight=False, soft_wrap=True)


@app.command(help_epilogue=SETTINGS_HELP)
def evaluate(
    bundle: str,
    *settings: Settings,
    split: Literal["test", "train"] = "test",
    jpeg: Annotated[int | None, Parameter(validator=validators.Number(gte=1, lte=100))] = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure a bundle from its files: accuracy after 8-bit rounding, and likeness of protected to plain images.

    Parameters
    ----------
    bundle
        Path or URI of a bundle.
    split
        Which split of the data to measure on.
    jpeg
        Also measure what is classified when the upload is re-encoded as a JPEG of this quality.
    output
        Also write the numbers to this JSON file.
    """
    from raypp.evaluation.evaluate import evaluate_bundle
    from raypp.metrics.statistics import chance_error

    numbers = evaluate_bundle(bundle, settings, split, jpeg)
    if output is not None:
        from raypp.utils.storage import Storage

        Storage(output.absolute().parent).write(output.name, (json.dumps(numbers, indent=2) + "\n").encode())
    _print_numbers(Console(), numbers, None, split)
    _print_chance_error(chance_error(numbers))
    return numbers


@app.command
def protect(
    bundle: str,
    source: Path,
    target: Path,
    /,
    *,
    key: Path | None = None,
    keep_size: bool = False,
    quiet: bool = False,
) -> int:
    """Protect images with the public part of a bundle, offline.

    Parameters
    ----------
    bundle
        A bundle or its public folder.
    source
        An image, or a folder of images.
    target
        Where to write: a .png file for one image, a folder (made anew or empty) for a folder.
    key
        Key file of a keyed protection; not needed with a whole bundle, whose private part holds it.
    keep_size
        Keep each image's own size instead of fitting it to the size that the classifier was trained on.
    quiet
        Print nothing but errors.
    """
    from raypp.client.offline import protect_files

    console = None if quiet else Console(stderr=True)
    return protect_files(bundle, source, target, key=key, keep_size=keep_size, console=console)


@app.command
def serve(
    bundle: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: str | None = None,
    attack: Annotated[bool, Parameter(negative="")] = False,
    haproxy: bool = False,
    write: Path | None = None,
) -> None:
    """Serve a bundle's classifier over HTTP until interrupted.

    Parameters
    ----------
    bundle
        Path or URI of a bundle, or of a shelf that `raypp publish` fills: what becomes live there is taken over.
    host
        Address to listen on; one that others can reach needs tokens.
    port
        Port to listen on.
    tokens
        Token file (see `raypp token`): every request then needs one.
    attack
        Also serve the attacks on the bundle, to all who can reach the service.
    haproxy
        Let Ray's HAProxy take the requests in place of its own proxy: more than twice as many a second of one image.
    write
        Start nothing; write the configuration for `serve deploy` to this file.
    """
    from raypp.serve.server import configured

    config = configured(bundle, host=host, port=port, tokens=tokens, attack=attack)
    console = Console(stderr=True)
    if write is not None:
        import yaml

        from raypp.utils.storage import Storage

        if haproxy:
            raise ConfigError(
                "--haproxy has no place in a configuration for `serve deploy`: what the cluster's `ray start` finds in "
                "the environment decides (see docs/serve.md)"
            )
        if write.exists():
            raise ConfigError(f"--write: {str(write)!r} exists already; give a new file")
        text = yaml.safe_dump(config, sort_keys=False)
        Storage(write.absolute().parent).write(write.name, text.encode())
        console.print(f"wrote {write}; serve deploy {write}", markup=False, highlight=False, soft_wrap=True)
        return
    serving = _from_ray("raypp.serve.server", "serving")
    metrics_of = _from_ray("raypp.cluster.session", "metrics_url")
    try:
        with console.status("starting Ray and the services"), contextlib.ExitStack() as stack:
            url = stack.enter_context(serving(config, haproxy=haproxy))
            running = stack.pop_all()
        with running:
            said = [(a["name"], f"{url}/{a['name']}/docs") for a in config["applications"]]
            said += [("metrics", found)] if (found := metrics_of()) is not None else []
            for name, where in said:
                console.print(f"{name:<11} {where}", markup=False, highlight=False, soft_wrap=True)
            console.print(f"raypp classify {url} IMAGE_OR_FOLDER", markup=False, highlight=False, soft_wrap=True)
            _until_interrupted()
            console.print("stopping", highlight=False)
    except KeyboardInterrupt:  # while it starts or stops
        raise KeyboardInterrupt("stopped") from None


@app.command
def publish(bundle: str, shelf: str, /, *, url: str | None = None, token_file: Path | None = None) -> None:
    """Check a bundle, put it on a shelf and make it the live one; services that serve the shelf take it over.

    Parameters
    ----------
    bundle
        Path or URI of a bundle.
    shelf
        Folder or URI of published bundles; made anew where there is none.
    url
        Of a service that serves the shelf: wait until it has taken over; if it refuses, the old bundle is live again.
    token_file
        File that holds a bearer token for that service.
    """
    from raypp.serve.server import publish as put

    published = put(bundle, shelf, url=url, token=_token(token_file))
    before = f", before it {published.previous}" if published.previous else ""
    Console().print(f"{published.version} is live{before}", markup=False, highlight=False, soft_wrap=True)


@app.command
def token(
    name: str,
    /,
    *,
    file: Path,
    scopes: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    revoke: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Make a bearer token for the services; it is printed once, the file keeps its hash.

    Parameters
    ----------
    name
        Whose token it is.
    file
        Token file; made anew where there is none.
    scopes
        What it allows: classify (the default), attack.
    revoke
        Take this token out of the file instead; running services refuse it from then on.
    """
    from raypp.serve.auth import add_token, remove_token

    if revoke:
        remove_token(file, name)
        return
    sys.stdout.write(add_token(file, name, scopes or ["classify"]) + "\n")


@app.command
def classify(
    url: str,
    paths: Annotated[list[Path], Parameter(allow_leading_hyphen=False)],
    /,
    *,
    key: Path | None = None,
    pin: str | None = None,
    token_file: Path | None = None,
    top: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=5))] = 1,
    patience: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 60.0,
) -> int:
    """Protect images here, send them to a service and print their classes.

    Parameters
    ----------
    url
        Of the service, as http://127.0.0.1:8000.
    paths
        Images and folders of images.
    key
        Key file of a keyed protection.
    pin
        SHA-256 that the service's protection must have; another one is refused.
    token_file
        File that holds a bearer token for the service.
    top
        Classes to print of each image, up to 5.
    patience
        Seconds for which a service that does not answer is asked again.
    """
    from rich.progress import Progress

    from raypp.client.http import Client
    from raypp.utils.image_files import find_images

    files = [file for path in paths for file in find_images(path)]
    console = Console(stderr=True)
    failed = 0
    told = float("-inf")

    def failing(file: object, error: RayppError) -> None:
        nonlocal failed
        failed += 1
        reason = str(error) if str(file) in str(error) else f"{file}: {error}"
        console.print(f"raypp: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
        bars.advance(task)

    def waiting(reason: str, seconds: float) -> None:
        nonlocal told
        if time.monotonic() - told > TOLD_SECONDS:  # else every request to a busy service would say so
            told = time.monotonic()
            said = f"{_printable(reason)}; asking again for up to {seconds:.0f} s"
            console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)

    with (
        Client(url, token=_token(token_file), key=key, pin=pin, patience=patience, on_wait=waiting) as client,
        Progress(console=console, disable=not console.is_terminal, transient=True) as bars,
    ):
        task = bars.add_task("classifying", total=len(files))
        for file, found in client.stream(files, on_error=failing):
            # Labels are the cloud's words: none of them may speak to the terminal.
            words = "  ".join(f"{_printable(label)} {probability:.1%}" for label, probability in found.top[:top])
            sys.stdout.write(f"{file!s}  {words}\n")
            bars.advance(task)
    if failed:
        raise RayppError(f"{failed:,} of {len(files):,} images were not classified")
    return len(files)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


@app.command
def demo(
    urls: Annotated[list[str], Parameter(allow_leading_hyphen=False)],
    /,
    *,
    port: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=65535))] = 7860,
    key: Path | None = None,
    token_file: Path | None = None,
) -> None:
    """Show on a page of this machine what is sent of an image, what the cloud answers and what attackers recover.

    Parameters
    ----------
    urls
        Of services, as http://127.0.0.1:8000 or NAME=http://127.0.0.1:8000; of several, one is chosen on the page.
    port
        Port of the page, on this machine only.
    key
        Key file of a keyed protection.
    token_file
        File that holds a bearer token for the services, with the scopes classify and attack.
    """
    from raypp.client.demo import running, services

    console = Console(stderr=True)
    offered = services(urls, token=_token(token_file), key=key)
    with running(offered, port=port) as address:
        console.print(address, markup=False, highlight=False, soft_wrap=True)
        _until_interrupted()
        console.print("stopping", highlight=False)


def _until_interrupted() -> None:
    """Wait for an interrupt or SIGTERM."""
    stop = threading.Event()
    with told_by(stop, signal.SIGINT, signal.SIGTERM):
        while not stop.wait(1):
            pass


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {str(file)!r} cannot be read: {error}") from error


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
    preset, flags = _preset(preset, settings)
    sys.stdout.write(load_config(preset, file, flags).to_yaml())
    if (search := load_tree(preset, file, flags, more=("search",)).get("search")) is not None:
        sys.stdout.write(yaml.safe_dump({"search": search}, sort_keys=False))


@data_app.command
def ls() -> None:
    """List the data sources and their options."""
    from raypp.data.convert import describe

    console = Console()
    for source in describe():
        console.print(f"[bold]{source['name']}[/]  {source['doc']}", highlight=False)
        for key, default in source["options"].items():
            console.print(f"    --{key:<15} {'required' if default is None else default}", highlight=False)


@data_app.command
def convert(source: str, out: Path, /, *options: Settings, image_size: tuple[int, int] | None = None) -> None:
    """Write a source as Parquet in the Hugging Face column layout, images as lossless PNG.

    Parameters
    ----------
    source
        Name of a source (see `raypp data ls`); its options follow as flags, such as --path FOLDER.
    out
        A new or empty folder.
    image_size
        Fit every image to this height and width.
    """
    from rich.progress import Progress

    from raypp.data import convert as parquet

    chosen = _source(source, options, image_size)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        tasks = {split: bars.add_task(split, total=chosen.num_images(split)) for split in parquet.SPLITS}
        parquet.convert(chosen, out, progress=lambda split, done, _: bars.update(tasks[split], completed=done))
    console.print(f"wrote {out}", markup=False, highlight=False)


@data_app.command
def check(source: str, /, *options: Settings, image_size: tuple[int, int] | None = None) -> None:
    """Read every image of a source in full and count; exit code 1 if some are damaged or a split cannot be used.

    Parameters
    ----------
    source
        Name of a source (see `raypp data ls`); its options follow as flags, such as --path FOLDER.
    image_size
        Fit every image to this height and width.
    """
    from rich.markup import escape
    from rich.table import Table

    from raypp.data import convert as parquet

    report = parquet.check(_source(source, options, image_size))
    console = Console()
    table = Table("split", "images", "H x W x C", "duplicates", "unreadable", "fingerprint", box=None, pad_edge=False)
    for split, part in (("train", report.train), ("test", report.test)):
        shape = " x ".join(map(str, part.shape)) if part.shape else "-"
        fingerprint = part.fingerprint[:16] if part.fingerprint else "-"
        numbers = (f"{part.num_images:,}", shape, f"{part.num_duplicates:,}", f"{part.num_unreadable:,}", fingerprint)
        table.add_row(split, *numbers)
    console.print(table)
    counts = Table("class", "train", "test", box=None, pad_edge=False)
    for label, num in report.train.counts.items():
        counts.add_row(escape(label), f"{num:,}", f"{report.test.counts[label]:,}")
    console.print(counts)
    console.print(f"test images that are also training images: {report.num_shared:,}", highlight=False)
    for split, part in (("train", report.train), ("test", report.test)):
        if lacking := [label for label, num in part.counts.items() if not num]:
            sentence = f"classes without images in {split}: {', '.join(lacking)}"
            console.print(sentence, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if report.unused:
        more = f" and {len(report.unused) - 20} more" if len(report.unused) > 20 else ""
        sentence = f"not read, since they belong to no split that is used: {', '.join(report.unused[:20])}{more}"
        console.print(sentence, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for part in (report.train, report.test):
        for sentence in (*part.unreadable, *([part.problem] if part.problem else [])):
            console.print(sentence, style="red", highlight=False, markup=False, soft_wrap=True)
    if not report.readable:
        raise SystemExit(1)


def _source(name: str, flags: tuple[str, ...], image_size: tuple[int, int] | None) -> Any:
    """Build a source from its name and its options as flags."""
    from raypp.config.overrides import parse_flags
    from raypp.config.validation import validate_data
    from raypp.data import SOURCES

    prefixed = ["--data.source." + flag[2:] if flag.startswith("--") else flag for flag in flags]
    options = parse_flags(prefixed).get("data", {}).get("source", {})
    data = validate_data({"source": {"name": name, **options}, "image_size": image_size})
    return SOURCES.build(data.source, size=data.image_size, channels=data.channels)


def _from_ray(module: str, function: str, instead: str = "--local trains in this process without it") -> Any:
    """A function that needs Ray, or one sentence where Ray is not installed or its cluster does not answer."""
    try:
        importlib.import_module("raypp.cluster.session").check_address()
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ConfigError(f"Ray is not installed here; {instead}") from None


def _new_name(preset: str) -> str:
    from datetime import datetime

    return f"{Path(preset).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def _print_results(found: dict[str, Any], where: str) -> None:
    console = Console()
    console.print()
    _print_numbers(console, found["test"], found["plain_test"])
    for label, file in (("picture", "protected.png"), ("bundle", "bundle"), ("metrics", "metrics.jsonl")):
        console.print(f"{label:<8} {where}/{file}", markup=False, highlight=False, soft_wrap=True)


def _print_search(found: dict[str, Any], where: str) -> None:
    """The front of a search, and where its best bundles lie."""
    from rich.table import Table

    console = Console()
    keys = sorted({key for point in found["front"] for key in point["settings"]})
    table = Table("trial", box=None, pad_edge=False)
    for title in ("accuracy", "leakage", "found", *(key.rpartition(".")[2] for key in keys)):
        table.add_column(title, justify="right")
    for point in found["front"]:
        shown = [_setting(point["settings"].get(key)) for key in keys]
        table.add_row(
            point["trial"], f"{point['accuracy']:.1%}", f"{point['leakage']:.3f}", f"{point['found']:.1%}", *shown
        )
    console.print("\n[bold]Pareto front[/] (validation accuracy after rounding, SSIM of the quick attack)")
    console.print(table)
    for name, trial in found["best"].items():
        card = found["scorecards"].get(trial)
        said = ""
        if card and card["found_by_drawing"] is not None:
            said = f"; the worst attack that draws finds {card['found_by_drawing']:.1%}"
        console.print(f"best {name:<9} {where}/best/{name}  (trial {trial}{said})", highlight=False, soft_wrap=True)
    for file in ("trials.csv", "front.png", *(["report/report.html"] if found["scorecards"] else [])):
        console.print(f"{where}/{file}", markup=False, highlight=False, soft_wrap=True)


def _setting(value: Any) -> str:
    from raypp.experiments.plots import label

    return f"{value:.3g}" if isinstance(value, float) else str(label(value))


def _print_table1(results: list[Result], where: str) -> None:
    from rich.table import Table

    console = Console()
    table = Table("data", "method", box=None, pad_edge=False)
    for title in ("paper", "ours, 8 bit", "spread", "SSIM to plain"):
        table.add_column(title, justify="right")
    for r in results:
        paper = r.paper
        row = [r.dataset, r.method.name, "-" if paper is None else f"{paper:.2f}%"]
        if r.accuracies:
            low, high = r.interval
            spread = f"± {r.spread:.2%}" if r.spread is not None else f"{low:.1%} to {high:.1%}"
            row += [f"{r.mean:.2%}", spread, "-" if r.ssim is None else f"{r.ssim:.3f}"]
        table.add_row(*row)
    console.print(table)
    for file in ("table1.md", "table1.csv", "table1.png"):
        console.print(f"{where}/{file}", markup=False, highlight=False, soft_wrap=True)


def _print_threats(rows: list[tuple[str, str, str]]) -> None:
    """The threat model of every attack, before it runs."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("attack", "threat", "the attacker has"):
        table.add_column(title, no_wrap=title != "the attacker has")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)


def _print_scorecard(card: dict[str, Any], where: str) -> None:
    from rich.table import Table

    from raypp.evaluation.scorecard import share_found

    colours = {"holds": "green", "weak": "yellow", "broken": "red", "inconclusive": "magenta"}
    table = Table(box=None, pad_edge=False)
    for title in ("attack", "threat"):
        table.add_column(title, no_wrap=True)
    for title in ("found", "SSIM", "PSNR dB", "edges"):
        table.add_column(title, justify="right")
    table.add_column("verdict", no_wrap=True)
    for name, found in card["attacks"].items():
        if found["status"] != "done":
            table.add_row(name, found["threat"], "-", "-", "-", "-", f"[dim]{found['status']}[/]")
            continue
        scores = found["scores"]
        numbers = (f"{scores['ssim']['mean']:.3f}", f"{scores['psnr']['mean']:.1f}", f"{scores['edges']['mean']:.3f}")
        words = f"[{colours[found['verdict']]}]{found['verdict']}[/]"
        least = "≥ " if found["lower_bound"] else ""  # more effort would find more
        table.add_row(name, found["threat"], f"{least}{found['found']:.1%}", *numbers, words)
    for name, scores in card["nulls"].items():
        numbers = (f"{scores['ssim']['mean']:.3f}", f"{scores['psnr']['mean']:.1f}", f"{scores['edges']['mean']:.3f}")
        table.add_row(f"[dim]{name}[/]", "", f"{share_found(scores):.1%}", *numbers, "[dim]no attack[/]")
    console = Console()
    console.print(table)
    if card["verdict"] is not None:
        console.print(
            f"\n[bold {colours[card['verdict']]}]{card['verdict']}[/] by the strongest attack, {card['worst_attack']}"
            f"{_reason(card['verdict_reason'])}"
        )
    if card["worst_drawing"] not in (None, card["worst_attack"]):
        words = card["verdict_by_drawing"]
        console.print(
            f"[bold {colours[words]}]{words}[/] by the strongest reconstruction attack, {card['worst_drawing']}"
            f"{_reason(card['verdict_reason_by_drawing'])}"
        )
    console.print(f"{where}/report.html", markup=False, highlight=False, soft_wrap=True)


def _reason(sentence: str) -> str:
    return f": {sentence}" if sentence else ""


def _print_numbers(console: Console, test: dict[str, Any], plain: dict[str, Any] | None, split: str = "test") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(f"{test['num_images']:,} {split} images")
    table.add_column("accuracy", justify="right")
    table.add_column("95% interval", justify="right")
    table.add_column("SSIM to plain", justify="right")
    for label, numbers in (("plain images", plain), ("protected, 8 bit", test)):
        if numbers is not None:
            low, high = numbers["accuracy_interval"]
            similarity = f"{numbers['ssim']['mean']:.3f}" if numbers["ssim"] else "-"
            table.add_row(label, f"{numbers['accuracy']:.2%}", f"{low:.1%} to {high:.1%}", similarity)
    if "jpeg" in test:
        low, high = test["accuracy_jpeg_interval"]
        table.add_row(
            f"after JPEG, quality {test['jpeg']}", f"{test['accuracy_jpeg']:.2%}", f"{low:.1%} to {high:.1%}", ""
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. An error is one sentence on stderr. :mod:`raypp.utils.errors` has the exit codes."""
    errors = Console(stderr=True)
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
        sys.stdout.flush()  # what a closed pipe does not take is noticed here, and not after the end
    except CycloptsError as error:
        _fail(errors, " ".join(str(error).split()), USAGE)
    except RayppError as error:
        _fail(errors, str(error), error.exit_code)
    except OSError as error:  # a full disk, say: what a user names is opened by code that has errors of its own
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(FAILURE) from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        hint = "" if os.environ.get(TRACEBACK) else f"; {TRACEBACK}=1 shows where"
        _fail(errors, reason + hint, FAILURE)
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or "interrupted; what was finished is kept, and --resume continues a run"
        errors.print(told, markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(130) from None


def _fail(console: Console, sentence: str, code: int) -> None:
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    sentence = sentence.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # names of files
    console.print(f"raypp: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise SystemExit(code)


def _nobody_reads() -> bool:
    """Whether standard output is a closed pipe, as after ``| head``; nothing more is then written to it."""
    try:
        number = sys.stdout.fileno()
    except OSError:  # it is no file, as in tests
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


if __name__ == "__main__":
    main()
