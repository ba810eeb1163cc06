"""Commands that measure: attack, report, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators
from rich.console import Console

from raypp.cli.app import ATTACK_HELP, SETTINGS_HELP, Settings, app, import_from_ray, new_name, without_settings
from raypp.cli.render import print_accuracy, print_chance_error, print_scorecard, print_threats
from raypp.utils.errors import ConfigError, RayppError

if TYPE_CHECKING:
    from raypp.experiments.attack_plan import AttackPlan


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
    from raypp.experiments.attack_plan import make_attack_plan

    if resume and name is None:
        raise ConfigError("--resume needs --name, the attack run to continue")
    bundles, settings = without_settings(bundle)
    if len(bundles) > 1:
        raise ConfigError(
            f"name one bundle, found {' and '.join(map(repr, bundles))}; a setting is written --name VALUE"
        )
    plan = make_attack_plan(
        bundle=bundles[0] if bundles else None,
        function=function,
        folders=folders,
        preset=preset,
        suite=suite,
        attacks=attacks or (),
        flags=settings,
        storage=storage,
        name=new_name("attack") if name is None else name,
    )
    return run_attacks(plan, resume=resume, local=local, quiet=quiet)


def run_attacks(plan: AttackPlan, *, resume: bool = False, local: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run a plan's attacks, write report and scorecard, print and return the latter."""
    from raypp.evaluation.report.render import write_report
    from raypp.experiments.attack_plan import threat_table
    from raypp.experiments.attack_run import run_attack_suite, run_attacks_locally

    def announce(opened: AttackPlan) -> None:
        if not quiet:
            print_threats(threat_table(opened))

    run = run_attacks_locally if local else import_from_ray("raypp.cluster.attack", "run_on_ray")
    card = run_attack_suite(plan, resume=resume, quiet=quiet, announce=announce, run=run)
    write_report([plan.storage.uri], plan.storage)
    if not quiet:
        print_scorecard(card, plan.storage.uri)
    print_chance_error(card["at_chance"])
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
    print_accuracy(Console(), numbers, None, split)
    print_chance_error(chance_error(numbers))
    return numbers
