"""Commands of services and their clients: serve, publish, token, classify, protect, demo."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators
from rich.console import Console

from raypp.cli.app import app, import_from_ray
from raypp.utils.errors import ConfigError, RayppError
from raypp.utils.signals import stop_on_signal

NOTICE_SECONDS = 10.0  # between two lines that say that a service does not answer


@app.command
def protect(
    bundle: str,
    source: Path,
    target: Path,
    /,
    *,
    key: Path | None = None,
    keep_size: bool = False,
    quiet: bool = False,
) -> int:
    """Protect images with the public part of a bundle, offline.

    Parameters
    ----------
    bundle
        A bundle or its public folder.
    source
        An image, or a folder of images.
    target
        Where to write: a .png file for one image, a folder (made anew or empty) for a folder.
    key
        Key file of a keyed protection; not needed with a whole bundle, whose private part holds it.
    keep_size
        Keep each image's own size instead of fitting it to the size that the classifier was trained on.
    quiet
        Print nothing but errors.
    """
    from raypp.client.offline import protect_files

    console = None if quiet else Console(stderr=True)
    return protect_files(bundle, source, target, key=key, keep_size=keep_size, console=console)


@app.command
def serve(
    bundle: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: str | None = None,
    attack: Annotated[bool, Parameter(negative="")] = False,
    haproxy: bool = False,
    write: Path | None = None,
) -> None:
    """Serve a bundle's classifier over HTTP until interrupted.

    Parameters
    ----------
    bundle
        Path or URI of a bundle, or of a shelf that `raypp publish` fills: what becomes live there is taken over.
    host
        Address to listen on; one that others can reach needs tokens.
    port
        Port to listen on.
    tokens
        Token file (see `raypp token`): every request then needs one.
    attack
        Also serve the attacks on the bundle, to all who can reach the service.
    haproxy
        Let Ray's HAProxy take the requests in place of its own proxy: more than twice as many a second of one image.
    write
        Start nothing; write the configuration for `serve deploy` to this file.
    """
    from raypp.serve.server import build_serve_config

    config = build_serve_config(bundle, host=host, port=port, tokens=tokens, attack=attack)
    console = Console(stderr=True)
    if write is not None:
        import yaml

        from raypp.utils.storage import Storage

        if haproxy:
            raise ConfigError(
                "--haproxy has no place in a configuration for `serve deploy`: what the cluster's `ray start` finds in "
                "the environment decides (see docs/serve.md)"
            )
        if write.exists():
            raise ConfigError(f"--write: {str(write)!r} exists already; give a new file")
        text = yaml.safe_dump(config, sort_keys=False)
        Storage(write.absolute().parent).write(write.name, text.encode())
        console.print(f"wrote {write}; serve deploy {write}", markup=False, highlight=False, soft_wrap=True)
        return
    serving = import_from_ray("raypp.serve.server", "running_server")
    metrics_of = import_from_ray("raypp.cluster.session", "metrics_url")
    try:
        with console.status("starting Ray and the services"), contextlib.ExitStack() as stack:
            url = stack.enter_context(serving(config, haproxy=haproxy))
            running = stack.pop_all()
        with running:
            said = [(a["name"], f"{url}/{a['name']}/docs") for a in config["applications"]]
            said += [("metrics", found)] if (found := metrics_of()) is not None else []
            for name, where in said:
                console.print(f"{name:<11} {where}", markup=False, highlight=False, soft_wrap=True)
            console.print(f"raypp classify {url} IMAGE_OR_FOLDER", markup=False, highlight=False, soft_wrap=True)
            _until_interrupted()
            console.print("stopping", highlight=False)
    except KeyboardInterrupt:  # while it starts or stops
        raise KeyboardInterrupt("stopped") from None


@app.command
def publish(bundle: str, shelf: str, /, *, url: str | None = None, token_file: Path | None = None) -> None:
    """Check a bundle, put it on a shelf and make it the live one; services that serve the shelf take it over.

    Parameters
    ----------
    bundle
        Path or URI of a bundle.
    shelf
        Folder or URI of published bundles; made anew where there is none.
    url
        Of a service that serves the shelf: wait until it has taken over; if it refuses, the old bundle is live again.
    token_file
        File that holds a bearer token for that service.
    """
    from raypp.serve.server import publish as put

    published = put(bundle, shelf, url=url, token=_token(token_file))
    before = f", before it {published.previous}" if published.previous else ""
    Console().print(f"{published.version} is live{before}", markup=False, highlight=False, soft_wrap=True)


@app.command
def token(
    name: str,
    /,
    *,
    file: Path,
    scopes: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    revoke: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Make a bearer token for the services; it is printed once, the file keeps its hash.

    Parameters
    ----------
    name
        Whose token it is.
    file
        Token file; made anew where there is none.
    scopes
        What it allows: classify (the default), attack.
    revoke
        Take this token out of the file instead; running services refuse it from then on.
    """
    from raypp.serve.auth import add_token, remove_token

    if revoke:
        remove_token(file, name)
        return
    sys.stdout.write(add_token(file, name, scopes or ["classify"]) + "\n")


@app.command
def classify(
    url: str,
    paths: Annotated[list[Path], Parameter(allow_leading_hyphen=False)],
    /,
    *,
    key: Path | None = None,
    pin: str | None = None,
    token_file: Path | None = None,
    top: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=5))] = 1,
    patience: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 60.0,
) -> int:
    """Protect images here, send them to a service and print their classes.

    Parameters
    ----------
    url
        Of the service, as http://127.0.0.1:8000.
    paths
        Images and folders of images.
    key
        Key file of a keyed protection.
    pin
        SHA-256 that the service's protection must have; another one is refused.
    token_file
        File that holds a bearer token for the service.
    top
        Classes to print of each image, up to 5.
    patience
        Seconds for which a service that does not answer is asked again.
    """
    from rich.progress import Progress

    from raypp.client.http import Client
    from raypp.utils.image_files import find_images

    files = [file for path in paths for file in find_images(path)]
    console = Console(stderr=True)
    failed = 0
    told = float("-inf")

    def failing(file: object, error: RayppError) -> None:
        nonlocal failed
        failed += 1
        reason = str(error) if str(file) in str(error) else f"{file}: {error}"
        console.print(f"raypp: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
        bars.advance(task)

    def waiting(reason: str, seconds: float) -> None:
        nonlocal told
        if time.monotonic() - told > NOTICE_SECONDS:  # else every request to a busy service would say so
            told = time.monotonic()
            said = f"{_printable(reason)}; asking again for up to {seconds:.0f} s"
            console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)

    with (
        Client(url, token=_token(token_file), key=key, pin=pin, patience=patience, on_wait=waiting) as client,
        Progress(console=console, disable=not console.is_terminal, transient=True) as bars,
    ):
        task = bars.add_task("classifying", total=len(files))
        for file, found in client.stream(files, on_error=failing):
            # Labels are the cloud's words: none of them may speak to the terminal.
            words = "  ".join(f"{_printable(label)} {probability:.1%}" for label, probability in found.top[:top])
            sys.stdout.write(f"{file!s}  {words}\n")
            bars.advance(task)
    if failed:
        raise RayppError(f"{failed:,} of {len(files):,} images were not classified")
    return len(files)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


@app.command
def demo(
    urls: Annotated[list[str], Parameter(allow_leading_hyphen=False)],
    /,
    *,
    port: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=65535))] = 7860,
    key: Path | None = None,
    token_file: Path | None = None,
) -> None:
    """Show on a page of this machine what is sent of an image, what the cloud answers and what attackers recover.

    Parameters
    ----------
    urls
        Of services, as http://127.0.0.1:8000 or NAME=http://127.0.0.1:8000; of several, one is chosen on the page.
    port
        Port of the page, on this machine only.
    key
        Key file of a keyed protection.
    token_file
        File that holds a bearer token for the services, with the scopes classify and attack.
    """
    from raypp.client.demo import open_services, running_demo

    console = Console(stderr=True)
    offered = open_services(urls, token=_token(token_file), key=key)
    with running_demo(offered, port=port) as address:
        console.print(address, markup=False, highlight=False, soft_wrap=True)
        _until_interrupted()
        console.print("stopping", highlight=False)


def _until_interrupted() -> None:
    """Wait for an interrupt or SIGTERM."""
    stop = threading.Event()
    with stop_on_signal(stop, signal.SIGINT, signal.SIGTERM):
        while not stop.wait(1):
            pass


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {str(file)!r} cannot be read: {error}") from error
