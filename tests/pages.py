"""Blocks of the documentation's pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python|text)([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def all_blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, info string and text of each block of bash, Python or shown output."""
    return [(language, info.strip(), text) for language, info, text in BLOCK.findall((ROOT / page).read_text())]


def command_lines(text: str) -> list[str]:
    """The commands of a block of bash, each on one line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]
