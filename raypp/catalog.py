"""Lists of presets, protections, attacks, suites, data sources and rows of Table I, with a line on each."""

from __future__ import annotations

from typing import Any

from raypp.attacks import ATTACKS
from raypp.config.presets import describe_presets
from raypp.protections import PROTECTIONS


def list_presets() -> dict[str, str]:
    """Presets with their descriptions."""
    return describe_presets()


def list_attacks() -> dict[str, str]:
    """Attacks with their threat level and first line of documentation."""
    return {name: f"{ATTACKS.get(name).threat.name}: {_first_line(ATTACKS.get(name))}" for name in ATTACKS}


def list_protections() -> dict[str, str]:
    """Protections with the first line of their documentation."""
    return {name: _first_line(PROTECTIONS.get(name)) for name in PROTECTIONS}


def list_suites() -> dict[str, str]:
    """Suites of attacks with their descriptions."""
    from raypp.attacks.suite import suite_presets

    return {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in suite_presets().items()}


def list_sources() -> dict[str, str]:
    """Data sources with the first line of their documentation and their options."""
    from raypp.data.convert import describe

    def text(source: dict[str, Any]) -> str:
        options = ", ".join(f"--{key} ({default})" for key, default in source["options"].items())
        return f"{source['doc']} Options: {options}"

    return {source["name"]: text(source) for source in describe()}


def list_rows() -> dict[str, str]:
    """Rows of Table I with their labels."""
    from raypp.experiments.table1_grid import table_rows

    return {name: row.label for name, row in table_rows().items()}


LISTS = {
    "presets": list_presets,
    "protections": list_protections,
    "attacks": list_attacks,
    "suites": list_suites,
    "sources": list_sources,
    "rows": list_rows,
}


def _first_line(method: type) -> str:
    return (method.__doc__ or "").strip().partition("\n")[0].replace("``", "`")
