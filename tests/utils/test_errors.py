"""Errors are one sentence, also where what caused them says nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import raypp
from raypp.utils.errors import StorageError, first_line, last_line
from raypp.utils.storage import Storage

EMPTY = [Exception(), RuntimeError(""), ValueError("  \n\n"), OSError(), KeyError()]


@pytest.mark.parametrize("error", EMPTY, ids=repr)
def test_an_error_that_says_nothing_is_named_by_its_type(error: Exception) -> None:
    assert first_line(error) == last_line(error) == type(error).__name__


def test_an_error_of_many_lines_is_cut() -> None:
    error = RuntimeError("\nfirst \r\nsecond\n\nlast\n")
    assert (first_line(error), last_line(error)) == ("first", "last")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(), "OSError"),
        (PermissionError(""), "PermissionError"),
        (OSError(5, ""), "[Errno 5]"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (shutil.Error([("a", "b", "[Errno 5] Input/output error: 'b'\nmore")]), "[Errno 5] Input/output error: 'b'"),
        (shutil.Error([("a", "b", "")]), "OSError"),
        (shutil.Error([]), "[]"),
        (shutil.Error(), "Error"),
    ],
    ids=repr,
)
def test_storage_that_refuses_without_a_reason(tmp_path: Path, error: OSError, reason: str) -> None:
    with pytest.raises(StorageError) as refusal, Storage(tmp_path)._convert_errors("read", "a"):
        raise error
    assert str(refusal.value).startswith(f"cannot read {tmp_path}/a: {reason}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("error", EMPTY[:3], ids=repr)
def test_a_service_that_does_not_start_and_says_nothing(error: Exception) -> None:
    from raypp.serve.server import _failure_reason

    assert _failure_reason("", error) == type(error).__name__
    assert _failure_reason("x raypp.utils.errors.BundleError: it is damaged\n", error) == "it is damaged"


def test_no_message_is_taken_apart_without_the_helper() -> None:
    """``str(error).splitlines()[0]`` fails where the message is empty."""
    pattern = re.compile(r"str\((error|e)\)[^\n]*splitlines\(\)\[")
    files = [path for path in Path(raypp.__file__).parent.rglob("*.py") if path.name != "errors.py"]
    assert [str(path) for path in files if pattern.search(path.read_text())] == []
