"""Errors with a message for the user: one sentence, no traceback.

The command line prints the message and exits with the error's ``exit_code``. Any other exception is a defect of raypp.
The exit codes of all commands:

====  ================================================================================================
0     done
1     a failure at run time: training diverged, a service does not answer, storage is full, attacks failed
2     bad usage or bad input: an option, a setting, a file, an image, a bundle or a name that is not allowed
130   interrupted by Ctrl-C
143   ended by SIGTERM, after a checkpoint
====  ================================================================================================
"""

from __future__ import annotations

import re

FAILURE, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
REPORTED = re.compile(r"raypp\.utils\.errors\.(\w+): (.+)")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return _lines(error)[0].strip()


def last_line(error: Exception) -> str:
    """The last line of an error's message, or the name of its type if the message is empty."""
    return _lines(error)[-1].strip()


def _lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


class RayppError(Exception):
    """Base of every error that a user can cause and correct; by default a failure at run time.

    Args:
        message: one sentence.
        exit_code: replaces the exit code of the class.
    """

    exit_code = FAILURE

    def __init__(self, message: str = "", *, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class ConfigError(RayppError):
    """A key, value or combination in the configuration is not allowed."""

    exit_code = USAGE


class DataError(RayppError):
    """A data source is missing, damaged or not of the stated form."""

    exit_code = USAGE


class BundleError(RayppError):
    """A bundle is missing, altered or newer than this version understands."""

    exit_code = USAGE


class StorageError(RayppError):
    """A path cannot be read or written, or another run uses it; a full disk is a failure at run time."""

    exit_code = USAGE


class TrainingError(RayppError):
    """Training cannot continue."""


class NonRetryableError(TrainingError):
    """A restart would fail again for the same reason, such as a loss that is not a number."""


class TrainingInterrupted(KeyboardInterrupt):
    """Raised after a requested stop, once a checkpoint is saved; the message names it, and the exit code is 143.

    It subclasses KeyboardInterrupt so that ``except Exception`` does not swallow it.
    """


def reported_error(text: str) -> RayppError | None:
    """The last raypp error in the text of a traceback, with the exit code of its class; None if there is none.

    Ray passes an error of one process to another inside its own errors, often only as the text of the traceback.
    """
    matches = REPORTED.findall(text)
    if not matches:
        return None
    kind, message = matches[-1]
    error: RayppError = globals()[kind](message)
    return error
