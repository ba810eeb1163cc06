"""Tables on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from raypp.experiments.table1_results import CellResult


def print_chance_error(sentence: str | None) -> None:
    """Print one red line on standard error, also with --quiet, if a classifier is at chance."""
    if sentence is not None:
        Console(stderr=True).print(f"error: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)


def print_results(found: dict[str, Any], where: str) -> None:
    console = Console()
    console.print()
    print_accuracy(console, found["test"], found["plain_test"])
    for label, file in (("picture", "protected.png"), ("bundle", "bundle"), ("metrics", "metrics.jsonl")):
        console.print(f"{label:<8} {where}/{file}", markup=False, highlight=False, soft_wrap=True)


def print_search(found: dict[str, Any], where: str) -> None:
    """The front of a search, and where its best bundles lie."""
    from rich.table import Table

    console = Console()
    keys = sorted({key for point in found["front"] for key in point["settings"]})
    table = Table("trial", box=None, pad_edge=False)
    for title in ("accuracy", "leakage", "re-identified", *(key.rpartition(".")[2] for key in keys)):
        table.add_column(title, justify="right")
    for point in found["front"]:
        shown = [_setting(point["settings"].get(key)) for key in keys]
        table.add_row(
            point["trial"],
            f"{point['accuracy']:.1%}",
            f"{point['leakage']:.3f}",
            f"{point['reidentification_rate']:.1%}",
            *shown,
        )
    console.print("\n[bold]Pareto front[/] (validation accuracy after rounding, SSIM of the quick attack)")
    console.print(table)
    for name, trial in found["best"].items():
        card = found["scorecards"].get(trial)
        said = ""
        if card and card["reidentification_rate_by_reconstruction"] is not None:
            said = f"; the worst attack that draws finds {card['reidentification_rate_by_reconstruction']:.1%}"
        console.print(f"best {name:<9} {where}/best/{name}  (trial {trial}{said})", highlight=False, soft_wrap=True)
    for file in ("trials.csv", "front.png", *(["report/report.html"] if found["scorecards"] else [])):
        console.print(f"{where}/{file}", markup=False, highlight=False, soft_wrap=True)


def _setting(value: Any) -> str:
    from raypp.experiments.plots import label

    return f"{value:.3g}" if isinstance(value, float) else str(label(value))


def print_table1(results: list[CellResult], where: str) -> None:
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


def print_threats(rows: list[tuple[str, str, str]]) -> None:
    """The threat model of every attack, before it runs."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("attack", "threat", "the attacker has"):
        table.add_column(title, no_wrap=title != "the attacker has")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)


def print_scorecard(card: dict[str, Any], where: str) -> None:
    from rich.table import Table

    from raypp.evaluation.scorecard import reidentification_rate

    colours = {"holds": "green", "weak": "yellow", "broken": "red", "inconclusive": "magenta"}
    table = Table(box=None, pad_edge=False)
    for title in ("attack", "threat"):
        table.add_column(title, no_wrap=True)
    for title in ("re-identified", "SSIM", "PSNR dB", "edges"):
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
        table.add_row(name, found["threat"], f"{least}{found['reidentification_rate']:.1%}", *numbers, words)
    for name, scores in card["baselines"].items():
        numbers = (f"{scores['ssim']['mean']:.3f}", f"{scores['psnr']['mean']:.1f}", f"{scores['edges']['mean']:.3f}")
        table.add_row(f"[dim]{name}[/]", "", f"{reidentification_rate(scores):.1%}", *numbers, "[dim]no attack[/]")
    console = Console()
    console.print(table)
    if card["verdict"] is not None:
        console.print(
            f"\n[bold {colours[card['verdict']]}]{card['verdict']}[/] by the strongest attack, {card['strongest_attack']}"
            f"{_reason(card['verdict_reason'])}"
        )
    if card["strongest_reconstruction"] not in (None, card["strongest_attack"]):
        words = card["verdict_by_reconstruction"]
        console.print(
            f"[bold {colours[words]}]{words}[/] by the strongest reconstruction attack, {card['strongest_reconstruction']}"
            f"{_reason(card['verdict_reason_by_reconstruction'])}"
        )
    console.print(f"{where}/report.html", markup=False, highlight=False, soft_wrap=True)


def _reason(sentence: str) -> str:
    return f": {sentence}" if sentence else ""


def print_accuracy(console: Console, test: dict[str, Any], plain: dict[str, Any] | None, split: str = "test") -> None:
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
