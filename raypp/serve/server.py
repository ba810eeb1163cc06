"""Running the services: here until interrupted, and what makes a bundle live on a running one."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

import raypp
from raypp.client.http import Client
from raypp.client.session import RemoteError
from raypp.serve.attack_catalog import load_attacks
from raypp.serve.auth import Tokens
from raypp.serve.haproxy import ray_settings
from raypp.serve.model_store import PublishedModel, current, publishing
from raypp.utils.errors import BundleError, ConfigError, RayppError, StorageError, first_line, last_line
from raypp.utils.network import is_loopback
from raypp.utils.storage import Storage

CONFIG = "serve_config.yaml"
ATTACK: dict[str, Any] = {
    "name": "attack",
    "route_prefix": "/attack",
    "import_path": "raypp.serve.deployments:build_attack",
    "args": {"max_images": 32},
}
"""What ``--attack`` adds; in the shipped file the same lines are behind a #."""
POLL_SECONDS = 0.5
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
ANSWER_SECONDS = 10.0  # for which a service that is published to may not answer


def config_template() -> dict[str, Any]:
    """The shipped ``serve_config.yaml``, from which both a cluster and ``raypp serve`` take what they deploy."""
    package = Path(raypp.__file__).parent
    places = (package / "serve" / CONFIG, package.parent / CONFIG)  # of an installed wheel, of a checkout
    for place in places:
        if place.is_file():
            config: dict[str, Any] = yaml.safe_load(place.read_text())
            return config
    raise ConfigError(f"{CONFIG} is missing in {package.parent}; install raypp again")


def build_serve_config(
    bundle: str, *, host: str, port: int, tokens: str | None, attack: bool = False
) -> dict[str, Any]:
    """``serve_config.yaml`` for one bundle or shelf.

    Raises:
        ConfigError: the host can be reached from elsewhere and there are no tokens.
        RayppError: bundle or token file cannot be used.
    """
    if tokens is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from elsewhere, so --tokens FILE is needed; raypp token makes one"
        )
    if not 0 < port < 2**16:
        raise ConfigError(f"--port is {port}; allowed is 1 to 65535")
    where = Storage(bundle).uri
    current(bundle)
    if tokens is not None:
        tokens = str(Path(tokens).expanduser().absolute())
        Tokens.read(tokens)
    config = config_template()
    config["http_options"] |= {"host": host, "port": port}
    if attack:
        config["applications"].append(copy.deepcopy(ATTACK))
    for application in config["applications"]:
        application["args"] |= {"bundle": where, "tokens": tokens}
    return config


@contextmanager
def running_server(config: dict[str, Any], *, haproxy: bool = False) -> Iterator[str]:
    """Run a configuration on this machine's own Ray, or on the cluster in RAY_ADDRESS; gives the services' URL.

    With ``haproxy`` Ray's HAProxy takes the requests, see :mod:`raypp.serve.haproxy`.

    Raises:
        ConfigError: the port is taken, or Ray does not start; or ``haproxy``, which a cluster's start decides on.
        RayppError: a service does not start; why.
    """
    host = config["http_options"]["host"]
    if haproxy and host not in ("127.0.0.1", "localhost", "0.0.0.0"):
        raise ConfigError(
            f"--haproxy reaches replicas at localhost, where none listens with --host {host}; allowed are 127.0.0.1 "
            "and 0.0.0.0"
        )
    from raypp.cluster.session import ray_session

    with (
        contextlib.ExitStack() as ending,  # left last
        _through_haproxy() if haproxy else contextlib.nullcontext(),
        ray_session(),
        _interruptible(),
    ):
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.schema import LoggingConfig

        from raypp.serve import deployments

        options = dict(config["http_options"])
        host, port = options["host"], options["port"]
        _refuse_taken(host, port)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            serve.start(
                proxy_location=config["proxy_location"],
                http_options=options,
                logging_config=LoggingConfig(**config["logging_config"]),
            )
        except RayError as error:
            reason = COLOURS.sub("", last_line(error))
            raise RayppError(f"Serve's proxy does not start: {reason}; logs/serve in Ray's folder has why") from error
        try:
            for application in config["applications"]:
                built = deployments.bind(application["name"], deployments.DeploymentConfig(**application["args"]))
                try:
                    serve.run(
                        built,
                        name=application["name"],
                        route_prefix=application["route_prefix"],
                        logging_config=LoggingConfig(**config["logging_config"]),
                    )
                except RuntimeError as error:
                    said = str(serve.status().applications[application["name"]])
                    raise RayppError(
                        f"the service {application['name']} does not start: {_failure_reason(said, error)}"
                    ) from error
            reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
            yield f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
        finally:
            # Serve ends its controller in the middle of a call, and Ray prints that the call failed.
            ending.enter_context(contextlib.redirect_stdout(io.StringIO()))
            for application in config["applications"]:
                serve.delete(application["name"])
            if not serve.status().applications:  # a cluster may serve other things too
                serve.shutdown()


@contextmanager
def _through_haproxy() -> Iterator[None]:
    """Have the Ray that is started next take requests by HAProxy; it reads its environment when it starts."""
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "--haproxy is for a Ray that this command starts, and RAY_ADDRESS names a cluster: what its `ray start` "
            "finds in the environment decides (see docs/serve.md)"
        )
    with ray_settings() as given:
        before = {key: os.environ.get(key) for key in given}
        os.environ.update(given)
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM an interrupt: Ray's own handler, in place once Ray runs, ends the process on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failure_reason(status: str, error: Exception) -> str:
    reasons = re.findall(r"raypp\.utils\.errors\.\w+: ([^\\\n]+)", status)
    return reasons[-1] if reasons else first_line(error)


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from error


def publish(
    bundle: str | Path, shelf: str | Path, *, url: str | None = None, token: str | None = None, patience: float = 120.0
) -> PublishedModel:
    """Make a bundle the live one of a shelf; with the URL of a service that serves it, wait until it has taken over.

    Raises:
        BundleError: it or its attacks do not work, or the service refused it; what was live is live again.
        RayppError: the shelf cannot be written, or the service does not answer.
    """
    if url is None:
        with publishing(bundle, shelf, check=load_attacks) as published:
            return published
    with Client(url, token=token, patience=ANSWER_SECONDS) as client:
        _version(client)  # a service that cannot be asked is no place to publish to
        with publishing(bundle, shelf, check=load_attacks) as published:
            _wait_until_active(client, shelf, published, patience)
            return published


def _wait_until_active(client: Client, shelf: str | Path, published: PublishedModel, patience: float) -> None:
    """Wait until a service serves a version, while its shelf names it."""
    version, end = published.version, time.monotonic() + patience
    while True:
        with contextlib.suppress(StorageError):  # a store that is away for a moment
            named = current(shelf).version
            if named != version:
                raise BundleError(f"somebody has made {named} live in place of {version} meanwhile; it stays live")
        with contextlib.suppress(RemoteError):
            live, rejected = _version(client)
            if live == version:
                return
            if rejected.get("version") == version and rejected.get("published") == published.published:
                raise BundleError(f"the service refused {version}: {rejected['reason']}; the old one stays live")
        if time.monotonic() > end:
            raise BundleError(
                f"the service has not taken over {version} within {patience:g} s; the old one stays live (does it "
                "serve this shelf?)"
            )
        time.sleep(POLL_SECONDS)


def _version(client: Client) -> tuple[str, dict[str, str]]:
    """The version that a service serves, and what it refused to."""
    about = client.model()
    try:
        return str(about["version"]), dict(about.get("rejected") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError("the service does not say which bundle it serves; is it a raypp classifier?") from error
