"""Tables and messages on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raypp.cli.app import print_json

if TYPE_CHECKING:
    from raypp.data.convert import Report
    from raypp.experiments.estimate import Estimate
    from raypp.results import Table1

NUM_LISTED = 20  # names or sentences of one kind
COLORS = {"holds": "green", "weak": "yellow", "broken": "red", "inconclusive": "magenta"}


def print_text(console: Console, text: object, style: str | None = None) -> None:
    """Print a line without markup, highlighting or wrapping."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_chance_error(sentence: str | None) -> None:
    """Print an error on standard error, also with --quiet, if a classifier is at chance."""
    if sentence is not None:
        print_text(Console(stderr=True), f"error: {sentence}", "red")


def print_results(results: dict[str, Any], where: str) -> None:
    console = Console()
    console.print()
    print_accuracy(console, results["test"], results["plain_test"])
    if "client" in results:  # a run of an earlier version has none
        print_client(console, results["client"])
    for label, file in (("picture", "protected.png"), ("bundle", "bundle"), ("metrics", "metrics.jsonl")):
        print_text(console, f"{label:<8} {where}/{file}")


def print_search(results: dict[str, Any], where: str) -> None:
    """Print the Pareto front of a search and the paths of its best bundles."""
    console = Console()
    keys = sorted({key for point in results["front"] for key in point["settings"]})
    titles = ("accuracy", "leakage", "re-identified", *(key.rpartition(".")[2] for key in keys))
    table = _table(("trial",), titles)
    for point in results["front"]:
        table.add_row(
            point["trial"],
            f"{point['accuracy']:.1%}",
            f"{point['leakage']:.3f}",
            f"{point['reidentification_rate']:.1%}",
            *(_format_setting(point["settings"].get(key)) for key in keys),
        )
    console.print("\n[bold]Pareto front[/] (validation accuracy after rounding, SSIM of the quick attack)")
    console.print(table)
    for name, trial in results["best"].items():
        card = results["scorecards"].get(trial)
        rate = card["reidentification_rate_by_reconstruction"] if card else None
        leakage = "" if rate is None else f"; the strongest reconstruction attack re-identifies {rate:.1%}"
        console.print(f"best {name:<9} {where}/best/{name}  (trial {trial}{leakage})", highlight=False, soft_wrap=True)
    for file in ("trials.csv", "front.png", *(["report/report.html"] if results["scorecards"] else [])):
        print_text(console, f"{where}/{file}")


def _format_setting(value: Any) -> str:
    from raypp.experiments.plots import label

    return f"{value:.3g}" if isinstance(value, float) else str(label(value))


def print_table1(results: Table1) -> None:
    console = Console()
    table = _table(("data", "method"), ("paper", "ours, 8 bit", "spread", "SSIM to plain"))
    for row in results.values["rows"]:
        cells = [row["data"], row["method"], "-" if row["paper"] is None else f"{row['paper']:.2f}%"]
        if row["accuracy"] is not None:
            interval = f"{row['low']:.1%} to {row['high']:.1%}"
            spread = interval if row["spread"] is None else f"± {row['spread']:.2%}"
            mark = " [red]at chance[/]" if row["at_chance"] else ""
            cells += [f"{row['accuracy']:.2%}{mark}", spread, "-" if row["ssim"] is None else f"{row['ssim']:.3f}"]
        table.add_row(*cells)
    console.print(table)
    for file in ("table1.md", "table1.csv", "table1.png"):
        print_text(console, f"{results.path}/{file}")


def print_plan(config: str | None, estimates: list[Estimate], *, json: bool) -> None:
    """Print a dry run: the merged configuration in YAML, if there is one, and the time of each part."""
    total = sum(estimate.seconds or 0 for estimate in estimates)
    if json:
        print_json({"config": config, "estimates": [vars(estimate) for estimate in estimates], "seconds": total})
        return
    console = Console()
    if config is not None:
        print_text(console, config)
    table = _table(("part",), ("estimated time",))
    table.add_column("")
    for estimate in estimates:
        time = (
            "does not apply"
            if estimate.seconds == 0
            else "not estimated"
            if estimate.seconds is None
            else _format_time(estimate.seconds)
        )
        table.add_row(estimate.name, time, f"[dim]{escape(estimate.detail)}[/]")
    console.print(table)
    others = "" if all(estimate.seconds is not None for estimate in estimates) else ", without those not estimated"
    machine = "on one process of this machine at its present load"
    print_text(console, f"in all about {_format_time(total)}{others}, {machine}; nothing started")


def print_estimate(estimates: list[Estimate]) -> None:
    """Print the time of work that may take hours, before it begins."""
    total = _format_time(sum(estimate.seconds or 0 for estimate in estimates))
    print_text(
        Console(stderr=True),
        f"about {total} on one process of this machine at its present load; --dry-run shows the parts",
    )


def _format_time(seconds: float) -> str:
    if seconds == 0:
        return "does not apply"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def print_next_steps(*steps: tuple[str, str]) -> None:
    """Print the commands that may follow, each with its purpose."""
    console = Console()
    console.print("\n[bold]Next[/]")
    for command, purpose in steps:
        console.print(f"  {escape(command):<58} [dim]{purpose}[/]", highlight=False, soft_wrap=True)


def print_threats(rows: list[tuple[str, str, str]]) -> None:
    """Print each attack's threat model."""
    table = _table(("attack", "threat"), no_wrap=True)
    table.add_column("the attacker has")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)


def print_scorecard(card: dict[str, Any], where: str, *, client: bool = True) -> None:
    """Print the scores, the verdict and, with ``client``, the client's cost."""
    from raypp.evaluation.scorecard import format_extra_score

    table = _table(("attack", "threat"), ("re-identified", "bits", "SSIM", "edges"), no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, attack in card["attacks"].items():
        if attack["status"] != "done":
            table.add_row(name, attack["threat"], "-", "-", "-", "-", f"[dim]{attack['status']}[/]")
            continue
        rate = f"{'≥ ' if attack['lower_bound'] else ''}{attack['reidentification_rate']:.1%}"
        verdict = f"[{COLORS[attack['verdict']]}]{attack['verdict']}[/]"
        table.add_row(name, attack["threat"], rate, *_mean_scores(attack["scores"]), verdict)
    for name, scores in card["baselines"].items():
        rate = f"{scores['reidentified']['mean']:.1%}"
        table.add_row(f"[dim]{name}[/]", "", rate, *_mean_scores(scores), "[dim]no attack[/]")
    console = Console()
    console.print(table)
    for name, attack in card["attacks"].items():
        for key, description in attack.get("extra_scores", {}).items():
            if key in attack["scores"]:  # one image alone has no AUC
                score = format_extra_score(key, attack["scores"][key])
                print_text(console, f"{name}: {score} {description}", "dim")
    console.print()
    strongest, reconstruction = card["strongest_attack"], card["strongest_reconstruction"]
    if card["verdict"] is not None:
        _print_verdict(console, card, strongest, "strongest attack", "")
    if reconstruction not in (None, strongest):
        _print_verdict(console, card, reconstruction, "strongest reconstruction attack", "_by_reconstruction")
    if client and card.get("client"):
        print_client(console, card["client"])
    elif client and card.get("client_note"):
        print_text(console, f"The client's cost was not measured: {card['client_note']}")
    print_text(console, f"{where}/report.html")


def _print_verdict(console: Console, card: dict[str, Any], name: str, role: str, suffix: str) -> None:
    """Print the verdict by one attack, with the gallery for which it holds, and the rates in smaller galleries."""
    from raypp.evaluation.reidentification import rates_by_gallery_size

    attack, reason = card["attacks"][name], card[f"verdict_reason{suffix}"]
    num_gallery = attack["num_gallery"]
    verdict = _bold(card[f"verdict{suffix}"])
    console.print(
        f"{verdict}, {role} {name}, gallery of {num_gallery:,} images{reason and f': {reason}'}", soft_wrap=True
    )
    sizes = rates_by_gallery_size(attack["scores"])
    rates = ", ".join(f"{size:,}: {rate:.1%}" for size, rate in sizes.items())
    bits = f"{attack['scores']['bits_identified']['mean']:.1f} of {math.log2(num_gallery):.1f} bits"
    parts = [f"by {attack['matcher']}", *([f"in galleries of {rates}"] if sizes else []), bits]
    print_text(console, f"  {'; '.join(parts)}", "dim")


def print_client(console: Console, client: dict[str, Any]) -> None:
    """Print the client's cost and the cloud gain."""
    from raypp.metrics.cost import describe_cost, describe_gain

    print_text(console, describe_cost(client))
    gain = client["cloud_gain_interval"]
    print_text(console, describe_gain(client), "red" if gain is not None and gain[1] < 0 else None)


def _mean_scores(scores: dict[str, dict[str, float]]) -> tuple[str, str, str]:
    """Bits identified, SSIM and edges."""
    bits, ssim, edges = (scores[key]["mean"] for key in ("bits_identified", "ssim", "edges"))
    return f"{bits:.1f}", f"{ssim:.3f}", f"{edges:.3f}"


def _bold(verdict: str) -> str:
    return f"[bold {COLORS[verdict]}]{verdict}[/]"


def print_accuracy(console: Console, test: dict[str, Any], plain: dict[str, Any] | None, split: str = "test") -> None:
    table = _table((f"{test['num_images']:,} {split} images",), ("accuracy", "95% interval", "SSIM to plain"))
    for label, metrics in (("plain images", plain), ("protected, 8 bit", test)):
        if metrics is not None:
            low, high = metrics["accuracy_interval"]
            similarity = f"{metrics['ssim']['mean']:.3f}" if metrics["ssim"] else "-"
            table.add_row(label, f"{metrics['accuracy']:.2%}", f"{low:.1%} to {high:.1%}", similarity)
    if "jpeg" in test:
        low, high = test["accuracy_jpeg_interval"]
        label = f"after JPEG, quality {test['jpeg']}"
        table.add_row(label, f"{test['accuracy_jpeg']:.2%}", f"{low:.1%} to {high:.1%}", "")
    console.print(table)


def print_data_report(report: Report) -> None:
    """Print the report of ``raypp data check``: images of each split and class, warnings and errors."""
    console = Console()
    splits = (("train", report.train), ("test", report.test))
    table = Table("split", "images", "H x W x C", "duplicates", "unreadable", "fingerprint", box=None, pad_edge=False)
    for name, split in splits:
        shape = " x ".join(map(str, split.shape)) if split.shape else "-"
        fingerprint = split.fingerprint[:16] if split.fingerprint else "-"
        table.add_row(
            name, f"{split.num_images:,}", shape, f"{split.num_duplicates:,}", f"{split.num_unreadable:,}", fingerprint
        )
    console.print(table)
    counts = Table("class", "train", "test", box=None, pad_edge=False)
    for label, num in report.train.counts.items():
        counts.add_row(escape(label), f"{num:,}", f"{report.test.counts[label]:,}")
    console.print(counts)
    console.print(f"test images that are also training images: {report.num_shared:,}", highlight=False)
    for name, split in splits:
        if empty := [label for label, num in split.counts.items() if not num]:
            print_text(console, f"classes without images in {name}: {', '.join(empty)}", "yellow")
    if report.unused:
        more = f" and {len(report.unused) - NUM_LISTED} more" if len(report.unused) > NUM_LISTED else ""
        names = ", ".join(report.unused[:NUM_LISTED])
        print_text(console, f"not read, since they belong to no split that is used: {names}{more}", "yellow")
    for _, split in splits:
        for sentence in (*split.unreadable, *([split.problem] if split.problem else [])):
            print_text(console, sentence, "red")


def print_problems(problems: Sequence[str]) -> None:
    """Print the first sentences of ``raypp data check`` about files that keep a source from being read."""
    console = Console()
    for sentence in problems[:NUM_LISTED]:
        print_text(console, sentence, "red")
    if len(problems) > NUM_LISTED:
        print_text(console, f"and {len(problems) - NUM_LISTED:,} more", "red")


def _table(left: tuple[str, ...], right: tuple[str, ...] = (), *, no_wrap: bool = False) -> Table:
    """An empty table with left-aligned and right-aligned columns."""
    table = Table(box=None, pad_edge=False)
    for title in left:
        table.add_column(title, no_wrap=no_wrap)
    for title in right:
        table.add_column(title, justify="right")
    return table
