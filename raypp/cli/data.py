"""Commands of data sources: list, convert, check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from raypp.cli.app import Settings, data_app


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
    from raypp.config.overrides import parse_overrides
    from raypp.config.validation import validate_data
    from raypp.data import SOURCES

    prefixed = ["--data.source." + flag[2:] if flag.startswith("--") else flag for flag in flags]
    options = parse_overrides(prefixed).get("data", {}).get("source", {})
    data = validate_data({"source": {"name": name, **options}, "image_size": image_size})
    return SOURCES.build(data.source, size=data.image_size, channels=data.channels)
