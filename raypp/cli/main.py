"""Entry point of the command line. Commands import torch and Ray only when they need them."""

from __future__ import annotations

import os
import re
import select
import shlex
import sys
import traceback

from cyclopts import CycloptsError, MissingArgumentError, UnknownCommandError
from rich.console import Console

from raypp.cli import attack, data, info, service, train
from raypp.cli.app import RESUME_OPTIONS, app
from raypp.cli.render import print_text
from raypp.utils.errors import FAILURE, INTERRUPTED, TERMINATED, USAGE, RayppError, TrainingInterrupted

COMMANDS = (attack, data, info, service, train)
"""Modules that add their functions as commands to :data:`app`."""
TRACEBACK = "RAYPP_TRACEBACK"  # environment variable: print tracebacks of errors


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an error is one sentence on stderr with an exit code of :mod:`raypp.utils.errors`."""
    errors = Console(stderr=True)
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
        sys.stdout.flush()  # raise BrokenPipeError here rather than at exit
    except CycloptsError as error:
        _fail(errors, _usage_sentence(error), USAGE)
    except RayppError as error:
        _fail(errors, str(error), error.exit_code)
    except OSError as error:  # such as a full disk; wrong paths raise RayppError
        if isinstance(error, BrokenPipeError) and _redirect_closed_stdout():
            raise SystemExit(FAILURE) from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        hint = "" if os.environ.get(TRACEBACK) else f"; {TRACEBACK}=1 shows where"
        _fail(errors, reason + hint, FAILURE)
    except KeyboardInterrupt as interrupt:
        sentence = str(interrupt) or "interrupted; a run that was saved continues with --resume"
        if (options := getattr(interrupt, RESUME_OPTIONS, None)) is not None:
            sentence += f": {_resuming_command(sys.argv[1:] if arguments is None else arguments, options)}"
        print_text(errors, sentence)
        raise SystemExit(TERMINATED if isinstance(interrupt, TrainingInterrupted) else INTERRUPTED) from None


def _resuming_command(arguments: list[str], options: dict[str, str]) -> str:
    """The command that continues interrupted work; ``options`` are added unless ``arguments`` have them."""
    command, *words = arguments
    names = {word.partition("=")[0] for word in words}
    for name, value in options.items():
        words += [] if name in names else [name, value] if value else [name]
    # The quickstart continues as a training; its attack is short.
    return shlex.join(["raypp", *(["train", "quickstart"] if command == "quickstart" else [command]), *words])


def _usage_sentence(error: CycloptsError) -> str:
    """A mistake in a command's words, with the command that shows its usage."""
    sentence = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, UnknownCommandError):  # without its incomplete list of commands
        sentence = sentence.partition(" Available commands:")[0].rstrip(".")
        sentence = re.sub(r"\. Did you mean (.+)\?$", r" (did you mean \1?)", sentence)
    if type(error) is MissingArgumentError and error.argument is not None:
        is_option = error.argument.field_info.is_keyword_only
        name = error.argument.name if is_option else error.argument.name.lstrip("-").upper()
        sentence = f"{name} is missing"
    command = " ".join(("raypp", *(error.command_chain or ()), "--help"))
    return f"{sentence}; `{command}` shows the usage"


def _fail(console: Console, sentence: str, code: int) -> None:
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    sentence = sentence.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # file names
    print_text(console, f"raypp: {sentence}", "red")
    raise SystemExit(code)


def _redirect_closed_stdout() -> bool:
    """Whether standard output is a closed pipe, as after ``| head``; if so, redirect it to the null device."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # no file, as in tests
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True
