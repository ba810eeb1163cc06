"""Publishing bundles in a model repository, and waiting until a service has loaded them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from raypp.client.http import Client
from raypp.client.session import RemoteError
from raypp.serve.attack_catalog import load_attacks
from raypp.serve.model_store import ModelRef, check_repository, publishing, resolve_model
from raypp.utils.errors import BundleError, StorageError

ANSWER_SECONDS = 10.0  # timeout of a service during a publication
SWITCH_SECONDS = 120.0  # within which a service must have loaded a published bundle
POLL_SECONDS = 0.5


def publisher(
    repository: str | Path | None,
    *,
    url: str | None = None,
    token: str | None = None,
    announce: Callable[[ModelRef], None] = lambda _: None,
) -> Callable[[str], None]:
    """Check before a training that :func:`publish` can write to a repository, and that the service answers.

    Args:
        repository: None publishes nothing.
        announce: called with the published version.

    Returns:
        a function that publishes the bundle of the trained run or search, by its location.

    Raises:
        RayppError: the repository cannot be written or is something else, or the service does not answer.
    """
    if repository is None:
        return lambda _: None
    check_repository(repository)
    if url is not None:
        with Client(url, token=token, patience=ANSWER_SECONDS) as client:
            _served_version(client)
    return lambda location: announce(publish(location, repository, url=url, token=token))


def publish(
    bundle: str | Path, repository: str | Path, *, url: str | None = None, token: str | None = None
) -> ModelRef:
    """Make a bundle the active version of a model repository.

    Args:
        bundle: location of a bundle, see :func:`raypp.bundle.locate.locate_bundle`.
        url: a service of this repository; wait until it has loaded the bundle.
        token: bearer token for the service.

    Raises:
        BundleError: the bundle or its attacks do not work, or the service rejects it; the old version is active again.
        RayppError: the repository cannot be written, or the service does not answer.
    """
    if url is None:
        with publishing(bundle, repository, check=load_attacks) as published:
            return published
    with Client(url, token=token, patience=ANSWER_SECONDS) as client:
        _served_version(client)  # fails before anything changes if the service does not answer
        with publishing(bundle, repository, check=load_attacks) as published:
            _wait_until_active(client, repository, published)
            return published


def _wait_until_active(client: Client, repository: str | Path, published: ModelRef) -> None:
    """Wait until a service uses the published version; fails if another version is published meanwhile."""
    version, end = published.version, time.monotonic() + SWITCH_SECONDS
    while True:
        with contextlib.suppress(StorageError):  # an outage of the storage
            named = resolve_model(repository).version
            if named != version:
                raise BundleError(f"another publication has replaced {version} by {named}, which stays active")
        with contextlib.suppress(RemoteError):
            active, rejected = _served_version(client)
            if active == version:
                return
            if rejected.get("version") == version and rejected.get("published") == published.published:
                raise BundleError(f"the service rejected {version}: {rejected['reason']}; the old one stays active")
        if time.monotonic() > end:
            raise BundleError(
                f"the service has not loaded {version} within {SWITCH_SECONDS:g} s, so the old one stays active; check "
                "that the service serves this repository"
            )
        time.sleep(POLL_SECONDS)


def _served_version(client: Client) -> tuple[str, dict[str, str]]:
    """The active version of a service, and the version that it rejected."""
    info = client.model()
    try:
        return str(info["version"]), dict(info.get("rejected") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError("the service does not say which bundle it serves; is it a raypp classifier?") from error
