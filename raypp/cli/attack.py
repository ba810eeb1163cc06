"""Commands attack, report, figure and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators
from rich.console import Console

from raypp.cli.app import (
    ATTACK_HELP,
    EVALUATE,
    AsJson,
    OnRay,
    Settings,
    Words,
    app,
    epilogue,
    print_json,
    resumable,
    set_verbosity,
    without_settings,
)
from raypp.cli.render import (
    print_accuracy,
    print_chance_error,
    print_estimate,
    print_plan,
    print_scorecard,
    print_text,
    print_threats,
)
from raypp.utils.errors import ConfigError, RayppError

LONG_SUITES = ("small", "standard")
"""Suites that take hours, so that their time is estimated first."""


@app.command(
    group=EVALUATE,
    help_epilogue=epilogue(
        "attack runs/first --suite quick",
        "attack --function mine.py:protect --preset cifar10-small",
        "attack --folders plain protected",
        text=ATTACK_HELP,
    ),
)
def attack(
    *bundle: Annotated[str, Parameter(allow_leading_hyphen=True)],
    function: str | None = None,
    preset: str | None = None,
    folders: tuple[str, str] | None = None,
    attacks: Words = None,
    suite: str | None = None,
    name: str | None = None,
    storage: str = "runs",
    resume: bool = False,
    ray: OnRay = None,
    dry_run: bool = False,
    json: AsJson = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Run all attacks that the threat levels allow, and write a scorecard and a report.

    Args:
        bundle: Path or URI of a bundle or of a run, unless --function or --folders names a target.
        function: Attack a protection of yours: MODULE:NAME or FILE.py:NAME of a function on NumPy uint8 (N, H, W, C).
        preset: Preset with the images for --function; default: cifar10-small.
        folders: Attack pairs of images: a folder of plain images, and one of protected images with the same names.
        attacks: Names of attacks to run (`raypp list attacks`); default: all of the suite.
        suite: Strength of the attacks: quick, small, standard, or a YAML file; default: quick, with a GPU small.
        name: Name of the attack run, a new folder in the storage; default: attack, date and time.
        storage: Folder or URI that holds the attack run's folder.
        resume: Continue the attack run NAME: finished attacks are not repeated, and attacks may be added.
        ray: Run attacks as Ray tasks (--ray) or in this process (--local); default: Ray with several GPUs.
        dry_run: Print the attacks and an estimate of the time, and write nothing.
        json: Print the scorecard as JSON on standard output.
        quiet: Print only warnings and errors.
        verbose: Also print the log lines of Ray and its workers; jobs on a cluster always do.
    """
    set_verbosity(verbose=verbose, quiet=quiet)
    from raypp import api
    from raypp.dispatch import default_suite, run_name
    from raypp.experiments.attack_plan import load_target_of
    from raypp.experiments.estimate import estimate_attacks

    name = run_name(name, "attack", storage, resume=resume, what="attack run")
    bundles, settings = without_settings(bundle)
    if len(bundles) > 1:
        raise ConfigError(f"name one bundle, not {' and '.join(map(repr, bundles))}; a setting is written --name VALUE")
    plan = api.attack_plan(
        bundles[0] if bundles else None, suite, settings, function=function, folders=folders, preset=preset,
        attacks=attacks or (), storage=storage, name=name,
    )  # fmt: skip
    if dry_run:
        print_plan(None, estimate_attacks(plan, load_target_of(plan)), json=json)
        return

    def announce(opened_plan: Any, target: Any) -> None:
        print_threat_table(opened_plan, target)
        if (suite or default_suite()) in LONG_SUITES:
            print_estimate(estimate_attacks(opened_plan, target))

    announcement: dict[str, Any] = {} if quiet or json else {"announce": announce}
    with resumable(name):
        card = api.run_attacks(plan, resume=resume, ray=ray, quiet=quiet or json, **announcement)
    print_attack_results(card, json=json, quiet=quiet)


def print_threat_table(plan: Any, target: Any) -> None:
    """Print the threat model of each attack of a plan on its target."""
    from raypp.experiments.attack_plan import threat_table

    print_threats(threat_table(plan, target))


def print_attack_results(card: Any, *, json: bool, quiet: bool, client: bool = True) -> None:
    """Print a scorecard, with ``client`` the client's cost too; raises RayppError if an attack failed."""
    results = card.to_dict()
    if json:
        print_json({"path": card.path} | results)
    elif not quiet:
        print_scorecard(results, card.path, client=client)
    print_chance_error(results["at_chance"])
    failed = [name for name, attack in results["attacks"].items() if attack["status"] == "failed"]
    if failed:
        raise RayppError(f"{len(failed)} of the attacks failed ({', '.join(failed)}); --resume tries them again")


@app.command(group=EVALUATE, help_epilogue=epilogue("report runs/first-attack runs/second --output report"))
def report(*sources: str, output: str = "report", json: AsJson = False) -> None:
    """Write one HTML report of attack runs and attacked bundles, with figures, CSV and JSON.

    Args:
        sources: Attack runs (see `raypp attack`), or attacked bundles and runs of `raypp train`.
        output: Path or URI of a folder that is new, empty, or holds an earlier report.
        json: Print the scorecards as JSON on standard output.
    """
    from raypp.evaluation.report.render import write_report
    from raypp.utils.storage import Storage

    target = Storage(output)
    summary = write_report(sources, target)
    if json:
        print_json({"path": target.uri} | summary)
    else:
        print_text(Console(), f"{target.uri}/report.html")


@app.command(
    group=EVALUATE,
    help_epilogue=epilogue(
        "figure 3 runs/alpha-0 runs/alpha-0.005 runs/alpha-0.01", "figure 4 runs/attack", "figure 5 runs/attack"
    ),
)
def figure(
    number: Literal[3, 4, 5],
    /,
    *sources: str,
    output: str = "figures",
    attacks: Words = None,
    num_images: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=100))] = 10,
    json: AsJson = False,
) -> None:
    """Draw a figure of the paper as SVG and PNG.

    Args:
        number: 3: protected images of runs, such as several alphas. 4: estimates of attacks with their PSNR. 5: boxes
            of the PSNR of all attacked images, and of estimates that need no attack.
        sources: For 3 runs or bundles; for 4 and 5 attack runs or attacked bundles.
        output: Path or URI of the folder of the files figureN.svg and figureN.png.
        attacks: Reconstruction attacks for 4 and 5; default: itn, the attack of the paper's authors.
        num_images: Images in 3 and 4; at most 10 in 4.
        json: Print the paths of the files as JSON on standard output.
    """
    from raypp.experiments.figures import write_figure
    from raypp.utils.storage import Storage

    target = Storage(output)
    names = write_figure(number, sources, target, attacks=attacks or (), num_images=num_images)
    if json:
        print_json([f"{target.uri}/{name}" for name in names])
        return
    for name in names:
        print_text(Console(), f"{target.uri}/{name}")


@app.command(
    group=EVALUATE,
    help_epilogue=epilogue("evaluate runs/first --jpeg 75", "evaluate runs/first --split val --output metrics.json"),
)
def evaluate(
    bundle: str,
    *settings: Settings,
    split: Literal["test", "val", "train"] = "test",
    jpeg: Annotated[int | None, Parameter(validator=validators.Number(gte=1, lte=100))] = None,
    output: Path | None = None,
    json: AsJson = False,
) -> None:
    """Measure a bundle's accuracy after 8-bit rounding, and the similarity of protected and plain images.

    Args:
        bundle: Path or URI of a bundle or of a run.
        split: Split of the data to measure on: test, val or train.
        jpeg: Also measure the accuracy after re-encoding protected images as JPEG of this quality, 1 to 100.
        output: JSON file for the metrics.
        json: Print the metrics as JSON on standard output.
    """
    from raypp import api
    from raypp.metrics.statistics import chance_error

    metrics = api.evaluate(bundle, settings, split=split, jpeg=jpeg).to_dict()
    if output is not None:
        from raypp.utils.documents import dump_json
        from raypp.utils.storage import Storage

        Storage(output.absolute().parent).write(output.name, dump_json(metrics))
    if json:
        print_json(metrics)
    else:
        print_accuracy(Console(), metrics, None, split)
    print_chance_error(chance_error(metrics))
