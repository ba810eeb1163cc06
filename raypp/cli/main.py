"""The command line. Each command is a function of the same name; torch and Ray are imported when one needs them."""

from __future__ import annotations

import os
import select
import sys
import traceback

from cyclopts import CycloptsError
from rich.console import Console

from raypp.cli import attack, data, service, train
from raypp.cli.app import app
from raypp.utils.errors import FAILURE, USAGE, RayppError

COMMANDS = (attack, data, service, train)
"""Modules whose functions are the commands; each adds its own to :data:`app`."""
TRACEBACK = "RAYPP_TRACEBACK"  # in the environment: errors show where they arose, too


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. An error is one sentence on stderr. :mod:`raypp.utils.errors` has the exit codes."""
    errors = Console(stderr=True)
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
        sys.stdout.flush()  # what a closed pipe does not take is noticed here, and not after the end
    except CycloptsError as error:
        _fail(errors, " ".join(str(error).split()), USAGE)
    except RayppError as error:
        _fail(errors, str(error), error.exit_code)
    except OSError as error:  # a full disk, say: what a user names is opened by code that has errors of its own
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(FAILURE) from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        hint = "" if os.environ.get(TRACEBACK) else f"; {TRACEBACK}=1 shows where"
        _fail(errors, reason + hint, FAILURE)
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or "interrupted; what was finished is kept, and --resume continues a run"
        errors.print(told, markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(130) from None


def _fail(console: Console, sentence: str, code: int) -> None:
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    sentence = sentence.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # names of files
    console.print(f"raypp: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise SystemExit(code)


def _nobody_reads() -> bool:
    """Whether standard output is a closed pipe, as after ``| head``; nothing more is then written to it."""
    try:
        number = sys.stdout.fileno()
    except OSError:  # it is no file, as in tests
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True
