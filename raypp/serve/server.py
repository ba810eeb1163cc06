"""Running the services until interrupted, and publishing bundles to running services."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import socket
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
from raypp.serve.model_store import ModelRef, publishing, resolve_model
from raypp.utils.errors import BundleError, ConfigError, RayppError, StorageError, first_line, last_line
from raypp.utils.network import is_loopback
from raypp.utils.signals import on_signal
from raypp.utils.storage import Storage

CONFIG = "serve_config.yaml"
ATTACK: dict[str, Any] = {
    "name": "attack",
    "route_prefix": "/attack",
    "import_path": "raypp.serve.deployments:build_attack",
    "args": {"max_images": 32},
}
"""The application that ``--with-attacks`` adds; the shipped file has the same lines behind a #."""
HAPROXY_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")
ANSWER_SECONDS = 10.0  # timeout of a service during a publication
SWITCH_SECONDS = 120.0  # within which a service must have loaded a published bundle
POLL_SECONDS = 0.5
ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def config_template() -> dict[str, Any]:
    """The shipped ``serve_config.yaml``, the template of all deployments."""
    package = Path(raypp.__file__).parent
    for path in (package / "serve" / CONFIG, package.parent / CONFIG):  # of an installed wheel, of a checkout
        if path.is_file():
            config: dict[str, Any] = yaml.safe_load(path.read_text())
            return config
    raise ConfigError(f"{CONFIG} is missing in {package.parent}; install raypp again")


def build_serve_config(bundle: str, *, host: str, port: int, tokens: str | None, attack: bool) -> dict[str, Any]:
    """``serve_config.yaml`` for one bundle or model repository.

    Raises:
        ConfigError: the port is out of range, or other machines can reach the host and no token file is set.
        RayppError: the bundle or the token file cannot be used.
    """
    if tokens is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from elsewhere, so --token-file FILE is needed; create one with raypp token"
        )
    if not 0 < port < 2**16:
        raise ConfigError(f"--port is {port}; allowed is 1 to 65535")
    uri = Storage(bundle).uri
    resolve_model(bundle)
    if tokens is not None:
        tokens = str(Path(tokens).expanduser().absolute())
        Tokens.read(tokens)
    config = config_template()
    config["http_options"] |= {"host": host, "port": port}
    config["applications"] = [
        application | {"args": application["args"] | {"bundle": uri, "tokens": tokens}}
        for application in [*config["applications"], *([ATTACK] if attack else [])]
    ]
    return config


@contextmanager
def running_server(config: dict[str, Any], *, haproxy: bool = False) -> Iterator[str]:
    """Run a configuration on a local Ray, or on the cluster in RAY_ADDRESS; yields the URL.

    With ``haproxy``, HAProxy takes the requests, see :mod:`raypp.serve.haproxy`.

    Raises:
        ConfigError: the port is in use, Ray does not start, or ``haproxy`` is not possible here.
        RayppError: a service does not start.
    """
    host, port = config["http_options"]["host"], config["http_options"]["port"]
    if haproxy and host not in HAPROXY_HOSTS:
        raise ConfigError(
            f"--haproxy reaches replicas at localhost, where none listens with --host {host}; allowed are 127.0.0.1 "
            "and 0.0.0.0"
        )
    from raypp.cluster.session import ray_session

    with (
        contextlib.ExitStack() as last,  # exits after Ray
        _haproxy_environment() if haproxy else contextlib.nullcontext(),
        ray_session(),
        on_signal(_interrupt, signal.SIGTERM),  # the handler of a running Ray would end the process at once
    ):
        from ray import serve

        _check_port(host, port)
        _start_proxy(config)
        try:
            for application in config["applications"]:
                _start_application(application, config["logging_config"])
            reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
            yield f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
        finally:
            # Serve stops its controller during a call, and Ray prints that the call failed.
            last.enter_context(contextlib.redirect_stdout(io.StringIO()))
            for application in config["applications"]:
                serve.delete(application["name"])
            if not serve.status().applications:  # a cluster may serve other applications
                serve.shutdown()


def _start_proxy(config: dict[str, Any]) -> None:
    from ray import serve
    from ray.exceptions import RayError

    from raypp.cluster import ray_logs

    if not ray_logs.are_shown():
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(config["proxy_location"], config["http_options"], logging_config=config["logging_config"])
    except RayError as error:
        reason = ANSI_COLOR.sub("", last_line(error))
        raise RayppError(f"Serve's proxy does not start: {reason}; see logs/serve in Ray's folder") from error


def _start_application(application: dict[str, Any], logging_config: dict[str, Any]) -> None:
    from ray import serve

    from raypp.serve import deployments

    name = application["name"]
    bound = deployments.bind(name, deployments.DeploymentConfig(**application["args"]))
    try:
        serve.run(bound, name=name, route_prefix=application["route_prefix"], logging_config=logging_config)
    except RuntimeError as error:
        reason = _failure_reason(str(serve.status().applications[name]), error)
        raise RayppError(f"the service {name} does not start: {reason}") from error


@contextmanager
def _haproxy_environment() -> Iterator[None]:
    """Set the environment that Ray reads at its start, so that HAProxy takes the requests."""
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "--haproxy is for a Ray that this command starts, and RAY_ADDRESS names a cluster; enable HAProxy in the "
            "environment of the cluster's `ray start` (see docs/how-to/haproxy.md)"
        )
    with ray_settings() as settings:
        before = {key: value for key, value in os.environ.items() if key in settings}
        os.environ |= settings
        try:
            yield
        finally:
            for key in settings:
                del os.environ[key]
            os.environ |= before


def _interrupt() -> None:
    raise KeyboardInterrupt


def _failure_reason(status: str, error: Exception) -> str:
    reasons = re.findall(r"raypp\.utils\.errors\.\w+: ([^\\\n]+)", status)
    return reasons[-1] if reasons else first_line(error)


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from error


def publish(
    bundle: str | Path, repository: str | Path, *, url: str | None = None, token: str | None = None
) -> ModelRef:
    """Make a bundle the active version of a model repository.

    Args:
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
