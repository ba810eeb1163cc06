"""Errors whose message is meant for the person who runs raypp: one sentence, no traceback.

The command line prints the message and exits with the error's ``exit_code``. Anything else that is raised is a defect
of raypp. The codes of all commands:

====  ================================================================================================
0     done
1     a failure at run time: training diverged, a service does not answer, storage is full, attacks failed
2     bad usage or bad input: an option, a setting, a file, an image, a bundle or a name that is not allowed
130   interrupted
====  ================================================================================================
"""

FAILURE, USAGE = 1, 2


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type where the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def last_line(error: Exception) -> str:
    """The last line of an error's message, or the name of its type where the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


class RayppError(Exception):
    """Base of every error a user can cause and mend; by itself a failure at run time.

    Args:
        message: one sentence.
        exit_code: of the command, where it is not the class's own.
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
    """A path cannot be read or written, or is taken by another run; where a disk is full, a failure at run time."""

    exit_code = USAGE


class TrainingError(RayppError):
    """Training cannot go on."""


class NonRetryableError(TrainingError):
    """Every worker stops for the same reason, such as a loss that is not a number: a restart would meet it again."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was told to stop and has written a checkpoint, which the message names; the exit code is 130.

    An interruption, and no error: whoever mends errors lets it pass.
    """
