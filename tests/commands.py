"""raypp's command line in processes forked from one that has imported torch, Ray and raypp.

Such a process takes signals, ends with an exit code and prints as a started one does, without 4 to 7 s of imports.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import mkdtemp

import pytest
from zygote import variables, zygote

ROOT = Path(__file__).parents[1]
PRELOADED = ["torch._dynamo", "raypp.cli.main", "raypp.cluster.attack", "raypp.cluster.tune"]


def fork_server() -> ForkServerContext:
    """Starts processes that have imported :data:`PRELOADED`; an optimizer's first step imports dynamo."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(zygote()).items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


class Command:
    """A running command with the methods of :class:`subprocess.Popen` that tests use.

    Args:
        arguments: of the command line, ``raypp`` first.
        environment: all variables of the process. Those that Ray reads while it is imported have the values that the
            tests' process had when it started the zygote.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT) -> None:
        assert arguments[0] == "raypp"
        self.args = list(arguments)
        outputs = Path(mkdtemp(prefix="raypp-command-"))
        atexit.register(shutil.rmtree, outputs, ignore_errors=True)
        self._outputs = [outputs / name for name in ("stdout", "stderr")]
        self._process = fork_server().Process(
            target=_run, args=(self.args, dict(environment), folder, *self._outputs), name=" ".join(arguments[:2])
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return all that it wrote to standard output and standard error."""
        self.wait(timeout)
        return self.output()

    def output(self) -> tuple[str, str]:
        """What it has written so far to standard output and standard error."""
        out, err = (path.read_text() if path.exists() else "" for path in self._outputs)
        return out, err


def _run(arguments: list[str], environment: dict[str, str], folder: Path, out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = arguments
    from raypp.cli.main import main

    main(arguments[1:])
