"""Commands of services and their clients: protect, serve, publish, token, classify and demo."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators
from rich.console import Console

from raypp.cli.app import OPERATE, USE, AsJson, Words, app, epilogue, print_json, set_verbosity
from raypp.cli.render import print_text
from raypp.utils.errors import ConfigError, RayppError
from raypp.utils.signals import stop_on_signal

NOTICE_SECONDS = 10.0  # between two messages that a service does not answer


@app.command(
    group=USE,
    help_epilogue=epilogue(
        "protect runs/first photos protected", "protect public image.png protected.png --key protection.key"
    ),
)
def protect(
    bundle: str, source: Path, target: Path, /, *, key: Path | None = None, keep_size: bool = False, quiet: bool = False
) -> int:
    """Protect images with the public part of a bundle, offline.

    Args:
        bundle: Path or URI of a bundle, of its public folder, or of what holds one, such as a run.
        source: An image, or a folder of images.
        target: Output: a .png file for one image, a new or empty folder for a folder.
        key: Key file of a keyed protection; a whole bundle holds it in its private part.
        keep_size: Keep each image's size instead of resizing and cropping it to the classifier's size.
        quiet: Print nothing but errors.
    """
    from raypp.client.offline import protect_files

    console = None if quiet else Console(stderr=True)
    return protect_files(bundle, source, target, key=key, keep_size=keep_size, console=console)


@app.command(
    group=OPERATE,
    help_epilogue=epilogue(
        "serve runs/first",
        "serve runs/models --host 0.0.0.0 --token-file tokens.json",
        "serve runs/first --output serve.yaml",
    ),
)
def serve(
    bundle: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: str | None = None,
    with_attacks: bool = False,
    no_haproxy: bool = False,
    num_gpus: float = 0,
    detach: bool = False,
    output: Path | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Serve a bundle's classifier over HTTP until interrupted.

    Args:
        bundle: Path or URI of a bundle, a run, a model repository (`raypp publish`), a search (SEARCH#knee), or a
            result of Ray Train or Tune; a newer bundle there replaces the served one.
        host: Address to listen on; one that other machines can reach needs --token-file.
        port: Port to listen on.
        token_file: Path or URI of a token file (see `raypp token`), or env:NAME of a variable that holds its text:
            every request then needs a token.
        with_attacks: Also serve the attacks on the bundle, to everyone who can reach the service.
        no_haproxy: Use Serve's own proxy; by default HAProxy takes the requests where Ray has it (Linux).
        num_gpus: GPUs of each replica, such as 0.25 for four replicas on one GPU; 0 computes on the CPU.
        detach: Deploy on the cluster in RAY_ADDRESS and end; the services stay (jobs/serve.py).
        output: File for the configuration of `serve deploy`; nothing is started.
        quiet: Print only warnings and errors.
        verbose: Also print the log lines of Ray, Serve and their workers.
    """
    set_verbosity(quiet=quiet, verbose=verbose)
    from raypp.serve.model_store import is_attacked
    from raypp.serve.server import build_serve_config

    if detach and (no_haproxy or output is not None):
        option = "--no-haproxy" if no_haproxy else "--output"
        raise ConfigError(f"--detach deploys on a running cluster; leave {option} out")
    config = build_serve_config(bundle, host=host, port=port, tokens=token_file, attack=with_attacks, num_gpus=num_gpus)
    if with_attacks and not is_attacked(bundle):
        sentence = f"warning: {bundle} has no attack results, so no attack is served; `raypp attack {bundle}` adds them"
        print_text(Console(stderr=True), sentence, "yellow")
    console = Console(stderr=True, quiet=quiet)
    if detach:
        _deploy(config, console)
    elif output is None:
        _serve_until_interrupted(config, not no_haproxy, console)
    elif no_haproxy:
        raise ConfigError(
            "--no-haproxy has no effect on `serve deploy`: the environment of the cluster's `ray start` decides (see "
            "docs/how-to/haproxy.md); leave it out"
        )
    else:
        _write_serve_config(config, output, console)


def _write_serve_config(config: dict[str, Any], path: Path, console: Console) -> None:
    import yaml

    from raypp.utils.storage import Storage

    if path.exists():
        raise ConfigError(f"--output: {str(path)!r} exists already; give a new file")
    Storage(path.absolute().parent).write(path.name, yaml.safe_dump(config, sort_keys=False).encode())
    print_text(console, f"wrote {path}; serve deploy {path}")


def _deploy(config: dict[str, Any], console: Console) -> None:
    from raypp.dispatch import import_from_ray

    deploy = import_from_ray("raypp.serve.server", "deploy", "services need it")
    with console.status("deploying the services"):
        url = deploy(config)
    for application in config["applications"]:
        address = f"{url}/{application['name']}/docs" if url else "runs at the address of the Serve that ran already"
        print_text(console, f"{application['name']:<11} {address}")
    print_text(console, "the services stay; `serve status` shows them, `serve shutdown` ends them")


def _serve_until_interrupted(config: dict[str, Any], haproxy: bool, console: Console) -> None:
    from raypp.dispatch import import_from_ray

    running_server = import_from_ray("raypp.serve.server", "running_server", "services need it")
    metrics_url = import_from_ray("raypp.cluster.session", "metrics_url")
    try:
        with console.status("starting Ray and the services"), contextlib.ExitStack() as stack:
            url = stack.enter_context(running_server(config, haproxy=haproxy))
            server = stack.pop_all()
        with server:
            links = [(app["name"], f"{url}/{app['name']}/docs") for app in config["applications"]]
            links += [("metrics", metrics)] if (metrics := metrics_url()) is not None else []
            for name, link in links:
                print_text(console, f"{name:<11} {link}")
            print_text(console, f"raypp classify {url} IMAGE_OR_FOLDER")
            _wait_for_interrupt()
            console.print("stopping", highlight=False)
    except KeyboardInterrupt:  # during the start or the stop
        raise KeyboardInterrupt("stopped") from None


@app.command(group=OPERATE, help_epilogue=epilogue("publish runs/first runs/models"))
def publish(bundle: str, repository: str, /, *, url: str | None = None, token_file: Path | None = None) -> None:
    """Check a bundle, add it to a model repository and activate it; services of the repository switch to it.

    Args:
        bundle: Path or URI of a bundle, or of what holds one: a run, a search (SEARCH#knee), a result of Ray.
        repository: Folder or URI of published bundles; created if it does not exist.
        url: URL of a service of the repository: wait until it has switched; if it refuses, reactivate the old bundle.
        token_file: File that holds a bearer token for that service.
    """
    from raypp.serve import publication

    print_published(Console(), publication.publish(bundle, repository, url=url, token=read_token(token_file)))


def print_published(console: Console, published: Any) -> None:
    """Print the version that a publication has activated, and the version before."""
    previous = f" instead of {published.previous}" if published.previous else ""
    print_text(console, f"{published.version} is active{previous}")


@app.command(
    group=OPERATE,
    help_epilogue=epilogue(
        "token alice --token-file tokens.json --scopes classify attack", "token alice --token-file tokens.json --revoke"
    ),
)
def token(name: str, /, *, token_file: str, scopes: Words = None, revoke: bool = False) -> None:
    """Create and print a bearer token for the services; the token file stores its hash.

    Args:
        name: Name of the token's owner.
        token_file: Path or URI of the token file; created if it does not exist. Object storage has no locks: run one
            command at a time there.
        scopes: Permissions of the token: classify (the default), attack.
        revoke: Remove this token from the file instead; running services refuse it from then on.
    """
    from raypp.serve.auth import add_token, remove_token

    if revoke:
        remove_token(token_file, name)
        print_text(Console(), f"revoked the token {name!r} in {token_file}")
        return
    sys.stdout.write(add_token(token_file, name, scopes or ["classify"]) + "\n")


@app.command(group=USE, help_epilogue=epilogue("classify http://127.0.0.1:8000 photos --top 3"))
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
    json: AsJson = False,
    quiet: bool = False,
) -> int:
    """Protect images here, send them to a service and print their classes.

    Args:
        url: URL of the service, such as http://127.0.0.1:8000.
        paths: Images and folders of images.
        key: Key file of a keyed protection.
        pin: Required SHA-256 of the service's protection; others are refused.
        token_file: File that holds a bearer token for the service.
        top: Number of classes to print for each image, up to 5.
        patience: Seconds during which requests to a service that does not answer are retried.
        json: Print the predictions as JSON on standard output.
        quiet: Print only predictions and errors.
    """
    from rich.progress import Progress

    from raypp.client.http import Client
    from raypp.utils.image_files import find_images

    files = [file for path in paths for file in find_images(path)]
    console, num_failed = Console(stderr=True), 0
    predictions: list[dict[str, Any]] = []

    def print_failure(file: object, error: RayppError) -> None:
        nonlocal num_failed
        num_failed += 1
        print_text(console, f"raypp: {error if str(file) in str(error) else f'{file}: {error}'}", "red")
        bars.advance(task)

    token, on_wait = read_token(token_file), _retry_notice(console)
    with (
        Client(url, token=token, key=key, pin=pin, patience=patience, on_wait=on_wait) as client,
        Progress(console=console, disable=quiet or not console.is_terminal, transient=True) as bars,
    ):
        task = bars.add_task("classifying", total=len(files))
        for file, prediction in client.stream(files, on_error=print_failure):
            # The service chooses the labels, so they are stripped of control characters.
            best = [(_printable(label), probability) for label, probability in prediction.top[:top]]
            if json:
                predictions.append({"file": str(file), "classes": [{"class": c, "probability": p} for c, p in best]})
            else:
                sys.stdout.write(f"{file!s}  {'  '.join(f'{label} {share:.1%}' for label, share in best)}\n")
            bars.advance(task)
    if json:
        print_json(predictions)
    if num_failed:
        raise RayppError(f"{num_failed:,} of {len(files):,} images were not classified")
    return len(files)


def _retry_notice(console: Console) -> Callable[[str, float], None]:
    """Callback that prints why requests are retried, at most every ``NOTICE_SECONDS``."""
    last_notice = float("-inf")

    def notify(reason: str, seconds: float) -> None:
        nonlocal last_notice
        if time.monotonic() - last_notice > NOTICE_SECONDS:
            last_notice = time.monotonic()
            print_text(console, f"{_printable(reason)}; retrying for up to {seconds:.0f} s", "yellow")

    return notify


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


@app.command(group=USE, help_epilogue=epilogue("demo http://127.0.0.1:8000"))
def demo(
    urls: Annotated[list[str], Parameter(allow_leading_hyphen=False)],
    /,
    *,
    port: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=65535))] = 7860,
    key: Path | None = None,
    token_file: Path | None = None,
    quiet: bool = False,
) -> None:
    """Open a local web page that shows an image's protected form, its classification and the attacks' results.

    Args:
        urls: URLs of services: http://127.0.0.1:8000 or NAME=http://127.0.0.1:8000; the page offers a choice of
            several.
        port: Port of the page, reachable from this machine only.
        key: Key file of a keyed protection.
        token_file: File that holds a bearer token for the services, with the scopes classify and attack.
        quiet: Print only errors.
    """
    from raypp.client.demo import open_services, running_demo

    console = Console(stderr=True, quiet=quiet)
    services = open_services(urls, token=read_token(token_file), key=key)
    with running_demo(services, port=port) as address:
        print_text(console, address)
        _wait_for_interrupt()
        console.print("stopping", highlight=False)


def _wait_for_interrupt() -> None:
    """Wait for SIGINT or SIGTERM."""
    stop = threading.Event()
    with stop_on_signal(stop, signal.SIGINT, signal.SIGTERM):
        while not stop.wait(1):
            pass


def read_token(file: Path | None) -> str | None:
    """Read a client's bearer token; raises ConfigError if the file cannot be read."""
    if file is None:
        return None
    try:
        return file.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {str(file)!r} cannot be read: {error}") from error
