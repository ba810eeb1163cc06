"""Commands list, config and doctor."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raypp.cli.app import START, AsJson, ConfigFiles, Settings, app, epilogue, preset_and_flags, print_json
from raypp.cli.render import print_text
from raypp.utils.errors import ConfigError

INDENT = "    "

Kind = Literal["presets", "protections", "attacks", "suites", "sources", "rows"]


@app.command(name="list", group=START, help_epilogue=epilogue("list attacks", "list presets --json"))
def list_(kind: Kind | None = None, /, *, json: AsJson = False) -> None:
    """List presets, protections, attacks, suites of attacks, data sources, or rows of Table I.

    Args:
        kind: What to list: presets, protections, attacks, suites, sources or rows; default: all.
        json: Print the lists as JSON on standard output.
    """
    from raypp.catalog import LISTS

    entries = {name: LISTS[name]() for name in (LISTS if kind is None else [kind])}
    if json:
        print_json(entries)
        return
    console = Console()
    for name, descriptions in entries.items():
        console.print(f"[bold]{name}[/]")
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
        for entry, description in descriptions.items():
            table.add_row(escape(entry), escape(description))
        console.print(table)


@app.command(
    group=START, help_epilogue=epilogue("config", "config cifar10 --train.epochs 50", "config cifar10 --explain")
)
def config(
    preset: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *settings: Settings,
    config: ConfigFiles = None,
    explain: bool = False,
    schema: bool = False,
    json: AsJson = False,
) -> None:
    """Print a preset's whole configuration, or list the presets.

    Args:
        preset: Name of a preset, or path of a YAML file.
        config: YAML file with settings that override the preset; may be repeated.
        explain: Print the meaning, type and allowed values of each setting.
        schema: Print the JSON schema of the configuration, for editors.
        json: Print the configuration as JSON on standard output.
    """
    from raypp.config.presets import load_config, load_tree

    if schema:
        from raypp.config.schema import Config

        print_json(Config.model_json_schema())
        return
    if preset is None:
        if explain:
            raise ConfigError("--explain needs a preset; `raypp config` lists them")
        _list_presets(json)
        return
    preset, flags = preset_and_flags(preset, settings)
    files: list[Path] = config or []
    merged = load_config(preset, files, flags)
    search = load_tree(preset, files, flags, more=("search",)).get("search")
    if json:
        print_json(merged.model_dump(mode="json") | ({"search": search} if search is not None else {}))
    elif explain:
        _explain(merged.model_dump(mode="json"))
    else:
        import yaml

        sys.stdout.write(merged.to_yaml())
        if search is not None:
            sys.stdout.write(yaml.safe_dump({"search": search}, sort_keys=False))


def _list_presets(json: bool) -> None:
    from raypp.config.presets import describe_presets

    descriptions = describe_presets()
    if json:
        print_json(descriptions)
        return
    console = Console()
    for name, description in descriptions.items():
        console.print(f"{name:<16} {description}", highlight=False, soft_wrap=True)


def _explain(tree: dict[str, Any]) -> None:
    """Print each setting of a merged configuration with its value, type and meaning."""
    from raypp.config.describe import describe_settings
    from raypp.config.overrides import flatten_dict

    values = flatten_dict(tree)
    descriptions = {(setting.key, setting.method): setting for setting in describe_settings()}
    console = Console()
    for key, value in values.items():
        section = key.rpartition(".")[0]
        method = f"{section.rpartition('.')[2]}: {values.get(f'{section}.name')}"
        setting = descriptions.get((key, method)) or descriptions.get((key, ""))
        assignment = Text(_indented(f"{key} = {value}", console.width, first=""))
        assignment.stylize("bold", 0, len(key))
        console.print(assignment, soft_wrap=True)
        if setting is not None:
            allowed = f"; allowed: {setting.allowed}" if setting.allowed else ""
            meaning = f"{setting.type}{allowed}. {setting.description}"
            print_text(console, _indented(meaning, console.width), "dim")


def _indented(text: str, width: int, first: str = INDENT) -> str:
    """Wrap a text at the terminal's width, each line with an indent; the first line begins with ``first``."""
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=INDENT, break_on_hyphens=False)


@app.command(group=START, help_epilogue=epilogue("doctor"))
def doctor(*, json: AsJson = False) -> None:
    """Check this machine: versions, processor, GPU, memory, optional packages, ports, weights and data.

    Args:
        json: Print the checks as JSON on standard output.
    """
    from raypp.utils.doctor import check_machine

    checks = check_machine()
    if json:
        print_json([vars(check) for check in checks])
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[dim]-[/]"}[check.ok]
        table.add_row(mark, escape(check.name), escape(check.value), f"[dim]{escape(check.hint)}[/]")
    Console().print(table)
