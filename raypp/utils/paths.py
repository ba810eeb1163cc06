"""Paths and URIs that mean the same in every process."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BeforeValidator


def resolve_path(location: str | Path) -> str:
    """Make a local path absolute and leave a URI unchanged; raises ValueError for any other text."""
    text = str(location)
    if not text.strip():
        raise ValueError(f"{text!r} is empty; allowed is a path or a URI")
    escaped = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if escaped != text:
        raise ValueError(f"{escaped!r} is not UTF-8; allowed are names that can be written as text")
    if "://" in text:
        if re.match(r"[^/@]*:[^/@]*@", text.partition("://")[2]):
            raise ValueError("a URI with a key in it is not allowed; set the key in the environment or use a role")
        return text
    path = Path(text).expanduser()
    try:
        return str(path.absolute())
    except FileNotFoundError:  # the current folder is gone, which happens to the folders of Ray jobs
        return str(Path(os.environ.get("PWD", "/")) / path)


# A path or URI in a configuration. Ray's workers run in other folders, so validation resolves relative paths at once.
PathOrUri = Annotated[str, BeforeValidator(lambda v: resolve_path(v) if isinstance(v, str | Path) else v)]


def shown_path(path: str) -> str:
    """A path as a user reads it: relative to the current folder if it lies below; others and URIs stay as they are."""
    return os.path.relpath(path) if Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()) else path


def short_name(location: str) -> str:
    """The last two parts of a path or URI, such as ``first/bundle``; reveals no paths of the machine."""
    path = urlsplit(location).path if "://" in location else location
    return "/".join(path.rstrip("/").split("/")[-2:])
