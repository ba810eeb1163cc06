"""A page of commands and their output, and the cluster of three nodes that :mod:`transcript` records."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "cluster-transcript.md"
BRIDGE, SUBNET = "raypp-run", "10.213.58"  # .1 is the head, .2 and .3 do the work, .254 is this machine with Redis
CPUS = 3  # of a worker node, as Ray counts them: two for a worker of the training, one for a replica
DRAIN_SECONDS, START_SECONDS = 20, 10
OBJECT_STORE_BYTES = 100_000_000
SETTINGS = {
    "RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH": "every process shows the cluster's token",
    f"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={DRAIN_SECONDS}": (
        f"a drained node leaves after {DRAIN_SECONDS} s; Ray's default is 30 s"
    ),
    f"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S={START_SECONDS}": (
        f"Ray Train tries again after {START_SECONDS} s if a worker has no node; its default is 60 s"
    ),
    "OMP_NUM_THREADS=1": "one thread per process",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV=0": "as raypp sets it: jobs use the environment of this checkout",
    "GLOO_SOCKET_IFNAME=rprnN, on node N": "the machine's name leads to loopback, where nodes do not reach each other",
    "--temp-dir, for each node its own": "machines have their own disks",
    f"--object-store-memory={OBJECT_STORE_BYTES}": "three object stores share the memory of one machine",
}
"""Settings of every `ray start` that the page's commands leave out, with their reasons."""
SHARED = "/shared"  # how the page names the folder that every node sees
RAYS_OWN = re.compile(
    r"^(\d{4}-\d\d-\d\d |\(|\[|=|-{5}|Next steps|Query the|Request the|\s+ray job|Tailing logs|Job submission)"
)
COLOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Page:
    """The page that is written, line by line; also printed."""

    def __init__(self, folder: Path) -> None:
        self.lines: list[str] = []
        self.folder = folder

    def add(self, text: str = "") -> None:
        for line in text.splitlines() or [""]:
            sys.stdout.write(line + "\n")
            self.lines.append(line)
        sys.stdout.flush()

    def prose(self, text: str) -> None:
        self.add("\n" + textwrap.fill(" ".join(text.split()), 118) + "\n")

    def heading(self, text: str) -> None:
        self.add(f"\n## {text}")

    def table(self, columns: tuple[str, str], rows: dict[str, str]) -> None:
        self.add(f"\n| {' | '.join(columns)} |\n|---|---|")
        for left, right in rows.items():
            self.add(f"| {left} | {right} |")
        self.add()

    @contextmanager
    def block(self) -> Iterator[None]:
        self.add("```text")
        try:
            yield
        finally:
            self.add("```")

    def clean(self, text: str) -> list[str]:
        """Output without colors, Ray's own log and paths of this machine, in lines of at most 118 characters."""
        text = COLOR.sub("", text).replace(str(self.folder), SHARED).replace(str(ROOT), ".")
        lines = [line.rstrip() for line in text.splitlines() if line.strip() and not RAYS_OWN.match(line)]
        return [part for line in lines for part in textwrap.wrap(line, 118, subsequent_indent="    ") or [""]]

    def command(self, words: str) -> None:
        shown = words.replace(str(self.folder), SHARED)
        lines = textwrap.wrap(
            f"$ {shown}", 112, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
        self.add(" \\\n".join(lines))

    def save(self) -> None:
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(self.lines)).strip() + "\n"
        PAGE.write_text(text)


class Nodes:
    """Three network namespaces on one bridge, with a Ray node in each."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.running = folder, dict[int, subprocess.Popen[bytes]]()
        token = folder / "cluster-token"
        token.write_text(secrets.token_hex(32))
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265", "RAY_DASHBOARD_ADDRESS": "http://127.0.0.1:8265",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self._ray_environment = self.environment | {
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS),
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_SECONDS),
        }
        self._head_environment: dict[str, str] = {}
        self._create_network(stack)

    def _create_network(self, stack: ExitStack) -> None:
        _ip("link", "add", BRIDGE, "type", "bridge")
        stack.callback(_ip, "link", "del", BRIDGE)
        _ip("addr", "add", f"{SUBNET}.254/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for node in (1, 2, 3):
            self.kill(node)  # left by a run that was killed
            name, outer, inner = f"{BRIDGE}-{node}", f"rpr{node}", f"rprn{node}"
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            stack.callback(_ip, "link", "del", outer)
            _ip("link", "set", inner, "netns", name)
            _ip("link", "set", outer, "master", BRIDGE, "up")
            _ip("-n", name, "addr", "add", f"{SUBNET}.{node}/24", "dev", inner)
            for device in (inner, "lo"):
                _ip("-n", name, "link", "set", device, "up")
            stack.callback(self.kill, node)

    def with_redis(self, stack: ExitStack) -> bool:
        """Start Redis, where the head keeps its state; False where it is not installed."""
        program = shutil.which("redis-server")
        if program is None:
            return False
        words = [program, "--bind", f"{SUBNET}.254", "--port", "6380", "--protected-mode", "no", "--save", ""]
        redis = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=self.folder)
        stack.callback(redis.wait)
        stack.callback(redis.kill)
        self._head_environment["RAY_REDIS_ADDRESS"] = f"{SUBNET}.254:6380"
        return True

    def start(self, node: int) -> str:
        """Start a node and return the command."""
        # A machine that starts again has no such file. Here Ray would read in it that the head runs.
        (self.folder / f"n{node}" / "ray_current_cluster").unlink(missing_ok=True)
        words = ["ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address={SUBNET}.{node}"]
        if node == 1:
            words += ["--head", "--port=6379", "--num-cpus=0", "--dashboard-host=127.0.0.1"]
        else:
            words += [f"--address={SUBNET}.1:6379", f"--num-cpus={CPUS}"]
        hidden = [f"--temp-dir={self.folder / f'n{node}'}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        log = (self.folder / f"node-{node}.log").open("wb")
        command = ["ip", "netns", "exec", f"{BRIDGE}-{node}", *words, *hidden]
        environment = self._ray_environment | {"GLOO_SOCKET_IFNAME": f"rprn{node}"}
        environment |= self._head_environment if node == 1 else {}
        self.running[node] = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        path = self.folder / f"node-{node}.log"
        wait_for(lambda: "Ray runtime started" in path.read_text(), 90, f"node {node} to start")
        return shlex.join(words)

    def pids(self, node: int) -> list[int]:
        words = ["ip", "netns", "pids", f"{BRIDGE}-{node}"]
        return [int(pid) for pid in subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()]

    def kill(self, node: int) -> None:
        """End every process of a node at once, as a machine that loses its power."""
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if (process := self.running.pop(node, None)) is not None:
            process.wait()

    def popen(self, node: int, *words: str) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", f"{BRIDGE}-{node}", *words]
        return subprocess.Popen(
            command, env=self.environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )


class Session:
    """Commands on the nodes, with what they print, on a page."""

    def __init__(self, page: Page, nodes: Nodes) -> None:
        self.page, self.nodes = page, nodes

    def run(self, command: str, *, node: int = 1, keep: str = "", last: int = 14, check: bool = True) -> str:
        """Run a shell command on a node, and show it with the last lines of its output that match ``keep``."""
        self.page.command(command)
        return self.finish(self.nodes.popen(node, "bash", "-c", command), keep=keep, last=last, check=check)

    def begin(self, command: str) -> subprocess.Popen[str]:
        self.page.command(command)
        return self.nodes.popen(1, "bash", "-c", command)

    def wait(self, job: subprocess.Popen[str], condition: Callable[[], Any], what: str) -> None:
        """Wait until a condition holds while a job runs."""
        wait_for(lambda: condition() or job.poll() is not None, 120, what)
        if job.poll() is not None:
            self.finish(job)
            raise RuntimeError(f"the job ended before {what}")

    def finish(self, process: subprocess.Popen[str], *, keep: str = "", last: int = 14, check: bool = True) -> str:
        output, _ = process.communicate(timeout=400)
        lines = [line for line in self.page.clean(output) if re.search(keep, line)]
        if lines:
            self.page.add("\n".join(["..."] * (len(lines) > last) + lines[-last:]))
        if check and process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {output}")
        return output


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=False, capture_output=True)


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until a condition holds and return its value; raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.3)
    return value
