"""Commands data convert and data check."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from raypp.cli.app import AsJson, Settings, data_app, epilogue, print_json
from raypp.cli.render import print_data_report, print_problems, print_text


@data_app.command(help_epilogue=epilogue("data convert cifar10 data/cifar10-parquet"))
def convert(
    source: str, output: Path, /, *options: Settings, image_size: tuple[int, int] | None = None, quiet: bool = False
) -> None:
    """Convert a source to Parquet with Hugging Face's columns and lossless PNG images.

    Args:
        source: Name of a source (see `raypp list sources`); its options follow as flags, such as --path FOLDER.
        output: A new or empty folder.
        image_size: Resize and crop every image to this height and width.
        quiet: Print only errors.
    """
    from rich.progress import Progress

    from raypp.data import convert as parquet

    data_source = _build_source(source, options, image_size)
    console = Console(stderr=True, quiet=quiet)
    with Progress(console=console, disable=quiet or not console.is_terminal) as bars:
        tasks = {split: bars.add_task(split, total=data_source.num_images(split)) for split in parquet.SPLITS}
        parquet.convert(data_source, output, progress=lambda split, done, _: bars.update(tasks[split], completed=done))
    print_text(console, f"wrote {output}")


@data_app.command(help_epilogue=epilogue("data check folder --path photos"))
def check(source: str, /, *options: Settings, image_size: tuple[int, int] | None = None, json: AsJson = False) -> None:
    """Decode and count every image of a source; exit code 1 for misplaced or unreadable images or unusable splits.

    Args:
        source: Name of a source (see `raypp list sources`); its options follow as flags, such as --path FOLDER.
        image_size: Resize and crop every image to this height and width.
        json: Print the report as JSON on standard output.
    """
    from raypp.data import convert as parquet

    data_source = _build_source(source, options, image_size)
    if problems := data_source.problems():
        if json:
            print_json({"problems": problems})
        else:
            print_problems(problems)
        raise SystemExit(1)
    report = parquet.check(data_source)
    if json:
        print_json(asdict(report))
    else:
        print_data_report(report)
    if not report.readable:
        raise SystemExit(1)


def _build_source(name: str, flags: tuple[str, ...], image_size: tuple[int, int] | None) -> Any:
    from raypp.config.overrides import parse_overrides
    from raypp.config.validation import validate_data
    from raypp.data import SOURCES

    prefixed = ["--data.source." + flag[2:] if flag.startswith("--") else flag for flag in flags]
    options = parse_overrides(prefixed).get("data", {}).get("source", {})
    data = validate_data({"source": {"name": name, **options}, "image_size": image_size})
    return SOURCES.build(data.source, size=data.image_size, channels=data.channels)
