"""Paths and URIs that mean the same in every process."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator


def _is_utf8(text: str) -> bool:
    return _escaped(text) == text


def _escaped(text: str) -> str:
    """Text whose bytes that are no UTF-8 are escaped."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def resolve_path(location: str | Path) -> str:
    """Make a local path absolute; leave a URI as it is; raises ValueError where there is none."""
    text = str(location)
    if not text.strip():
        raise ValueError(f"{text!r} is empty; allowed is a path or a URI")
    if not _is_utf8(text):
        raise ValueError(f"{_escaped(text)!r} is not UTF-8; allowed are names that can be written as text")
    if "://" in text:
        if re.match(r"[^/@]*:[^/@]*@", text.partition("://")[2]):
            raise ValueError(
                "a URI with a key in it is not allowed; keys come from the environment or the machine's role"
            )
        return text
    path = Path(text).expanduser()
    try:
        return str(path.absolute())
    except FileNotFoundError:  # the current folder is gone, as a job's has been seen to be
        return str(Path(os.environ.get("PWD", "/")) / path)


# A path or URI in a configuration. Ray's workers run in folders of their own, so a relative path is settled at once.
PathOrUri = Annotated[str, BeforeValidator(lambda v: resolve_path(v) if isinstance(v, str | Path) else v)]
