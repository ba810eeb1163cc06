"""Settings of the services in ``serve_config.yaml``."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

import raypp
from raypp.serve.admission import Limits
from raypp.utils.errors import ConfigError
from raypp.utils.paths import resolve_path


class DeploymentConfig(BaseModel):
    """The ``args`` of an application in ``serve_config.yaml``."""

    model_config = ConfigDict(extra="forbid")

    bundle: str
    """A bundle or a model repository (see ``raypp publish``) on any storage; see :func:`located`."""
    tokens: str | None = None
    """Path of a token file (see ``raypp token``); required unless the service listens on loopback."""
    max_body: int = Field(Limits.body, ge=1024)
    """Bytes of one request."""
    max_images: int = Field(Limits.images, ge=1)
    """Images of one request, and of one batch of the classifier."""
    look_every_s: float = Field(2.0, gt=0)
    """Interval between two polls of the model repository, in seconds."""
    max_waiting: int = Field(Limits.waiting, ge=1)
    """Images that wait for a replica's classifier; more are refused with 503."""
    timeout_s: float = Field(Limits.seconds, gt=0)
    """Timeout of a request, in seconds."""
    threads: int = Field(1, ge=1)
    """Threads of torch in each replica."""

    def limits(self) -> Limits:
        return Limits(self.max_body, self.max_images, self.timeout_s, waiting=self.max_waiting)


def located(location: str, hint: str = "") -> str:
    """Resolve a path of ``serve_config.yaml``, relative to Ray's start folder or else to the checkout.

    Args:
        hint: appended to the error.

    Raises:
        ConfigError: the path does not exist.
    """
    try:
        uri = resolve_path(location)
    except ValueError as error:
        raise ConfigError(f"a location is not understood: {error}") from error
    if "://" in uri or Path(location).expanduser().is_absolute():
        return uri
    folders = list(dict.fromkeys((Path(resolve_path(".")), Path(raypp.__file__).parent.parent)))
    for folder in folders:
        if (folder / location).exists():
            return str(folder / location)
    raise ConfigError(f"there is no {location!r} in {' or in '.join(map(str, folders))}{hint}")
