"""Running the services until interrupted, and deploying them on a cluster."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

import raypp
from raypp.bundle.locate import locate_bundle, split_choice
from raypp.serve.auth import VARIABLE, Tokens, token_location
from raypp.serve.haproxy import is_installed, ray_settings
from raypp.serve.loaded_model import load_model
from raypp.utils.errors import ConfigError, RayppError, first_line, last_line, reported_error
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
HAPROXY_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")  # it calls the replicas of its node at localhost
logger = logging.getLogger(__name__)
ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def config_template() -> dict[str, Any]:
    """The shipped ``serve_config.yaml``, the template of all deployments."""
    package = Path(raypp.__file__).parent
    for path in (package / "serve" / CONFIG, package.parent / CONFIG):  # of an installed wheel, of a checkout
        if path.is_file():
            config: dict[str, Any] = yaml.safe_load(path.read_text())
            return config
    raise ConfigError(f"{CONFIG} is missing in {package.parent}; install raypp again")


def build_serve_config(
    bundle: str, *, host: str, port: int, tokens: str | None, attack: bool, num_gpus: float = 0
) -> dict[str, Any]:
    """``serve_config.yaml`` for one bundle.

    Args:
        bundle: location of a bundle, see :func:`raypp.bundle.locate.locate_bundle`; replicas look there again.
        tokens: path or URI of a token file, or ``env:NAME`` of a variable in the environment of the replicas.
        num_gpus: GPUs of each replica.

    Raises:
        ConfigError: a number is out of range, or other machines can reach the host and no token file is set.
        RayppError: the bundle or the token file cannot be used.
    """
    if tokens is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from elsewhere, so --token-file FILE is needed; create one with raypp token"
        )
    if not 0 < port < 2**16:
        raise ConfigError(f"--port is {port}; allowed is 1 to 65535")
    if num_gpus < 0 or (num_gpus > 1 and num_gpus % 1):
        raise ConfigError(f"--num-gpus is {num_gpus:g}; allowed is a share of one GPU, such as 0.25, or a whole number")
    place, choice = split_choice(bundle)
    uri = Storage(place).uri + (f"#{choice}" if choice else "")
    locate_bundle(bundle)
    if tokens is not None:
        tokens = token_location(tokens)
        if not tokens.startswith(VARIABLE):
            Tokens.read(tokens)
    config = config_template()
    config["http_options"] |= {"host": host, "port": port}
    config["applications"] = [
        application | {"args": application["args"] | {"bundle": uri, "tokens": tokens}}
        for application in [*config["applications"], *([ATTACK] if attack else [])]
    ]
    if num_gpus:
        for application in config["applications"]:
            options = {"name": application["name"].capitalize(), "ray_actor_options": {"num_gpus": num_gpus}}
            application["deployments"] = [options]
    return config


@contextmanager
def running_server(config: dict[str, Any], *, haproxy: bool = True) -> Iterator[str]:
    """Run a configuration on a local Ray, or on the cluster in RAY_ADDRESS; yields the URL.

    On a local Ray, HAProxy takes the requests if it is installed and reaches the replicas at ``host``. On a cluster
    the environment of ``ray start`` decides.

    Args:
        haproxy: False for Serve's own proxy.

    Raises:
        ConfigError: the port is in use, Ray does not start, or ``haproxy`` is False on a cluster.
        RayppError: a service does not start.
    """
    host, port = config["http_options"]["host"], config["http_options"]["port"]
    if os.environ.get("RAY_ADDRESS"):
        if not haproxy:
            raise ConfigError(
                "--no-haproxy is for a Ray that this command starts, and RAY_ADDRESS names a cluster; the environment "
                "of the cluster's `ray start` decides (see docs/how-to/haproxy.md)"
            )
        haproxy = False
    haproxy = haproxy and uses_haproxy(host)
    from raypp.cluster.ray_logs import hidden_errors
    from raypp.cluster.session import ray_session

    with (
        contextlib.ExitStack() as last,  # exits after Ray
        _haproxy_environment() if haproxy else contextlib.nullcontext(),
        ray_session() as resources,
        on_signal(_interrupt, signal.SIGTERM),  # the handler of a running Ray would end the process at once
    ):
        _check_port(host, port)
        _check_gpus(config, resources)
        _start_proxy(config)
        try:
            for application in config["applications"]:
                _start_application(application, config["logging_config"])
            yield _reachable_url(host, port)
        finally:
            # Serve stops its controller during a call, and Ray prints that the call failed.
            last.enter_context(contextlib.redirect_stdout(io.StringIO()))
            last.enter_context(hidden_errors())
            _stop_applications([application["name"] for application in config["applications"]])


def uses_haproxy(host: str) -> bool:
    """Whether HAProxy takes the requests of a Ray that starts here: it is installed, and finds the replicas."""
    return host in HAPROXY_HOSTS and is_installed()


def deploy(config: dict[str, Any]) -> str | None:
    """Deploy a configuration on the cluster in RAY_ADDRESS, where it stays after this process.

    Returns:
        the URL; None if Serve runs there already, whose address stays.

    Raises:
        ConfigError: there is no cluster.
        RayppError: the bundle does not load, or a service does not start.
    """
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "--detach needs a running cluster in RAY_ADDRESS, which a job has (jobs/serve.py); a Ray that this command "
            "starts ends with it"
        )
    from raypp.cluster.session import ray_session

    with ray_session():
        from ray import serve

        for application in config["applications"]:  # before Serve replaces what runs
            load_model(locate_bundle(application["args"]["bundle"]))
        is_running = bool(serve.status().proxies)
        _start_proxy(config)
        for application in config["applications"]:
            _start_application(application, config["logging_config"])
    return None if is_running else _reachable_url(config["http_options"]["host"], config["http_options"]["port"])


def _reachable_url(host: str, port: int) -> str:
    """The URL of a service for clients on this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


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
    args = deployments.DeploymentConfig(**application["args"])
    bound = deployments.bind(name, args, application.get("deployments", ()))
    try:
        serve.run(bound, name=name, route_prefix=application["route_prefix"], logging_config=logging_config)
    except RuntimeError as error:
        status = serve.status().applications[name]
        text = "\n".join([status.message, *(deployment.message for deployment in status.deployments.values())])
        raise RayppError(f"the service {name} does not start: {_failure_reason(text, error)}") from error


def _stop_applications(names: list[str]) -> None:
    """Stop applications, and Serve after the last one; return at once if Ray ends, since calls would wait for it."""
    from ray import serve

    from raypp.cluster.session import has_ray_ended

    errors: list[Exception] = []

    def stop() -> None:
        try:
            for name in names:
                serve.delete(name)
            if not serve.status().applications:  # a cluster may serve other applications
                serve.shutdown()
        except Exception as error:  # raised below, in the main thread
            errors.append(error)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    while thread.is_alive() and not has_ray_ended():
        thread.join(0.1)
    if errors and not has_ray_ended():
        raise errors[0]


@contextmanager
def _haproxy_environment() -> Iterator[None]:
    """Set the environment that Ray reads at its start, so that HAProxy takes the requests."""
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


def _failure_reason(text: str, error: Exception) -> str:
    return str(reported_error(text) or first_line(error))


def _check_gpus(config: dict[str, Any], resources: dict[str, float]) -> None:
    """Raise ConfigError if a replica would wait for a GPU forever."""
    from raypp.cluster.session import resource_warning

    for application in config["applications"]:
        for options in application.get("deployments", ()):
            num_gpus = options.get("ray_actor_options", {}).get("num_gpus", 0)
            if num_gpus > resources.get("GPU", 0):
                name = application["name"]
                sentence = f"a replica of {name} needs {num_gpus:g} GPUs, the cluster has {resources.get('GPU', 0):g}"
                logger.warning(resource_warning(sentence, "--num-gpus"))


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from error
