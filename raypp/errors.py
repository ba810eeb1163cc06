"""Errors whose message is meant for the person who runs raypp: one sentence, no traceback.

The command line prints the message and exits with code 2. Anything else that is raised is a defect of raypp.
"""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type where the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def last_line(error: Exception) -> str:
    """The last line of an error's message, or the name of its type where the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


class RayppError(Exception):
    """Base of every error a user can cause and mend."""


class ConfigError(RayppError):
    """A key, value or combination in the configuration is not allowed."""


class DataError(RayppError):
    """A data source is missing, damaged or not of the stated form."""


class BundleError(RayppError):
    """A bundle is missing, altered or newer than this version understands."""


class StorageError(RayppError):
    """A path cannot be read or written, or is taken by another run."""


class TrainingError(RayppError):
    """Training cannot go on."""


class StoppedError(TrainingError):
    """Every worker stops for the same reason, such as a loss that is not a number: a restart would meet it again."""


class ToldToStop(KeyboardInterrupt):
    """Training was told to stop and has written a checkpoint, which the message names; the exit code is 130.

    An interruption, and no error: whoever mends errors lets it pass.
    """
