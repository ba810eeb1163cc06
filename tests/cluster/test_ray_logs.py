"""Ray's own lines are hidden at the end of a session, and shown with ``--verbose``."""

from __future__ import annotations

import os
import sys

import pytest

from raypp.cluster.ray_logs import hidden_errors
from raypp.utils.runtime import VERBOSE

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("verbose", ["0", "1"])
def test_errors_at_the_end_of_a_session(
    verbose: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that Ray's C++ code writes to the descriptor are hidden; later ones of raypp are printed."""
    monkeypatch.setenv(VERBOSE, verbose)
    with hidden_errors():
        os.write(2, b"E 1 2] task_manager.cc\n")
    print("raypp: no space left", file=sys.stderr, flush=True)
    os.write(2, b"after\n")
    shown = "E 1 2] task_manager.cc\n" if verbose == "1" else ""
    assert capfd.readouterr().err == f"{shown}raypp: no space left\nafter\n"
