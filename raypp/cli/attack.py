"""Commands attack, report and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators
from rich.console import Console

from raypp.cli.app import ATTACK_HELP, SETTINGS_HELP, Settings, app, import_from_ray, run_name, without_settings
from raypp.cli.render import print_accuracy, print_chance_error, print_scorecard, print_text, print_threats
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
    """Run all attacks that the threat levels allow, and write a scorecard and a report.

    Args:
        bundle: Path or URI of a bundle to attack, unless --function or --folders names a target. Settings may precede
            it.
        function: Attack your own protection: MODULE:NAME or FILE.py:NAME of a function on NumPy uint8 (N, H, W, C).
        preset: Preset with the images for --function; by default cifar10-small.
        folders: Attack pairs of images: a folder of plain images, and one of protected images with the same names.
        attacks: Names of the attacks to run; by default all of the suite.
        suite: Strength of the attacks: quick, small, standard, or the path of a YAML file.
        name: The attack run's name, a new folder under the storage path; by default attack, date and time.
        storage: Folder or URI that holds the attack run's folder.
        resume: Continue the attack run NAME: finished attacks are not repeated, and attacks may be added.
        local: Run the attacks in this process, one after the other, without Ray.
        quiet: Print nothing but warnings and errors.
    """
    from raypp.experiments.attack_plan import make_attack_plan

    name = run_name(name, "attack", resume=resume, what="attack run")
    bundles, settings = without_settings(bundle)
    if len(bundles) > 1:
        raise ConfigError(f"name one bundle, not {' and '.join(map(repr, bundles))}; a setting is written --name VALUE")
    plan = make_attack_plan(
        bundle=bundles[0] if bundles else None,
        function=function,
        folders=folders,
        preset=preset,
        suite=suite,
        attacks=attacks or (),
        flags=settings,
        storage=storage,
        name=name,
    )
    return run_attacks(plan, resume=resume, local=local, quiet=quiet)


def run_attacks(plan: AttackPlan, *, resume: bool = False, local: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run a plan's attacks, write the report, print and return the scorecard."""
    from raypp.evaluation.report.render import write_report
    from raypp.experiments.attack_plan import threat_table
    from raypp.experiments.attack_run import run_attack_suite, run_attacks_locally

    def announce(opened_plan: AttackPlan) -> None:
        if not quiet:
            print_threats(threat_table(opened_plan))

    run = run_attacks_locally if local else import_from_ray("raypp.cluster.attack", "run_on_ray")
    card = run_attack_suite(plan, resume=resume, quiet=quiet, announce=announce, run=run)
    write_report([plan.storage.uri], plan.storage)
    if not quiet:
        print_scorecard(card, plan.storage.uri)
    print_chance_error(card["at_chance"])
    failed = [name for name, attack in card["attacks"].items() if attack["status"] == "failed"]
    if failed:
        raise RayppError(f"{len(failed)} of the attacks failed ({', '.join(failed)}); --resume tries them again")
    return card


@app.command
def report(*sources: str, out: str = "report") -> None:
    """Write one HTML report of attack runs and attacked bundles, with figures, CSV and JSON.

    Args:
        sources: Attack runs (see `raypp attack`), or attacked bundles and runs of `raypp train`.
        out: Path or URI of a folder that is new, empty, or holds an earlier report.
    """
    from raypp.evaluation.report.render import write_report
    from raypp.utils.storage import Storage

    target = Storage(out)
    write_report(sources, target)
    print_text(Console(), f"{target.uri}/report.html")


@app.command(help_epilogue=SETTINGS_HELP)
def evaluate(
    bundle: str,
    *settings: Settings,
    split: Literal["test", "train"] = "test",
    jpeg: Annotated[int | None, Parameter(validator=validators.Number(gte=1, lte=100))] = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure a bundle's accuracy after 8-bit rounding, and the similarity of protected and plain images.

    Args:
        bundle: Path or URI of a bundle.
        split: Split of the data to measure on.
        jpeg: Also measure the accuracy after re-encoding protected images as JPEG of this quality.
        output: Also write the metrics to this JSON file.
    """
    from raypp.evaluation.evaluate import evaluate_bundle
    from raypp.metrics.statistics import chance_error
    from raypp.utils.documents import dump_json
    from raypp.utils.storage import Storage

    metrics = evaluate_bundle(bundle, settings, split, jpeg)
    if output is not None:
        Storage(output.absolute().parent).write(output.name, dump_json(metrics))
    print_accuracy(Console(), metrics, None, split)
    print_chance_error(chance_error(metrics))
    return metrics
