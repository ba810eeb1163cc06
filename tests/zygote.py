"""A process that has imported torch, Ray and other large packages, and from which processes of Ray are forked.

A worker of Ray imports for 3 to 7 seconds before it does anything, and a training run starts five and more. Forked from
the zygote it starts at once. What it runs is what Ray started it with; only the imports are done already.
``zygote_hook/sitecustomize.py`` passes on what a process was started with, and waits for the end of the forked one.

Ray reads settings while it is imported; :func:`read_settings` reads those again that differ between tests. One is not
read again: the process id of the raylet with which a worker ends. The zygote stands in for it. When a raylet ends, the
processes that it has started end too, and the zygote kills what it has forked for them.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import importlib.machinery
import json
import multiprocessing
import os
import pkgutil
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import zygote_client
from zygote_client import ask

if TYPE_CHECKING:
    from ray import ActorClassID

ROOT = Path(__file__).parents[1]
HOOK = Path(__file__).parent / "zygote_hook"
PRELOADED = [
    "torch._dynamo", "torchvision", "pandas", "scipy.stats", "pyarrow.dataset", "pyarrow.parquet", "pydantic.v1",
    "aiohttp", "grpc", "jsonschema", "requests", "fsspec", "optuna", "tensorboardX", "safetensors.torch", "PIL.Image",
    "jinja2", "rich.progress", "fastapi", "uvicorn", "colorful", "httpx", "opentelemetry.metrics",
    "sklearn.linear_model", "ray.train.torch", "ray.tune", "ray.serve", "ray.data", "ray.scripts.scripts",
    "ray.train.v2._internal.execution.controller.controller", "ray.dashboard.head", "ray._private.log_monitor",
    "ray.autoscaler._private.monitor",
    "raypp.cluster.attack", "raypp.cluster.tune", "raypp.serve.deployments",
]  # fmt: skip
SETTINGS = {
    # Where a process of Ray ends with its raylet: see above.
    "RAY_RAYLET_PID": str(os.getpid()),
    # The job of a worker that Ray starts in advance; its first task says which job it serves.
    "RAY_JOB_ID": "ffffffff",
    # An agent learns by a pipe that its raylet has ended. Without this it compares its parent with the raylet.
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
}
"""What Ray is imported with."""


def variables(zygote: Path) -> dict[str, str]:
    """Environment variables of a process whose Ray has its processes forked by a zygote."""
    return {"ZYGOTE": str(zygote), "PYTHONPATH": _python_path()}


def _python_path() -> str:
    return os.pathsep.join([str(HOOK), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


@cache
def zygote() -> Path:
    """The socket of this process' zygote, which ends when this process does."""
    folder = Path(tempfile.mkdtemp(prefix="zygote-"))  # a short path, as those of sockets are
    environment = os.environ | {"PYTHONPATH": _python_path()}
    process = subprocess.Popen([sys.executable, __file__, str(folder / "socket"), ""], env=environment)
    while not (folder / "socket").exists():
        assert process.poll() is None, "the zygote has ended"
        time.sleep(0.05)
    atexit.register(shutil.rmtree, folder)
    atexit.register(process.kill)
    return folder / "socket"


class ProcessTree:
    """A command and all processes that it starts; :attr:`pid` is an ancestor of each of them.

    It has the methods of :class:`subprocess.Popen` that tests use.

    Args:
        namespace: name of the Linux network namespace in which the command runs.
    """

    def __init__(
        self,
        zygote: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        working_folder: Path = ROOT,
        *,
        namespace: str = "",
    ) -> None:
        self.args, self.returncode = list(command), None
        folder = Path(tempfile.mkdtemp(prefix="zygote-"))
        self._outputs = [folder / "stdout", folder / "stderr"]
        arguments = [__file__, str(folder / "socket"), namespace, *command]
        request = {"arguments": arguments, "environment": dict(environment), "folder": str(working_folder)}
        with open(os.devnull) as null, ExitStack() as stack:
            outputs = [stack.enter_context(path.open("wb")) for path in self._outputs]
            self._client = ask(str(zygote), request, [null.fileno(), *(file.fileno() for file in outputs)])
        self.pid = int.from_bytes(self._client.recv(4), "big")

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                code = self._client.recv(4, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            self.returncode = int.from_bytes(code, "big") if code else 1
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send one of SIGTERM and SIGINT to the command."""
        os.kill(self.pid, number)

    def output(self) -> tuple[str, str]:
        """What it has written so far to standard output and standard error."""
        out, err = (path.read_text() for path in self._outputs)
        return out, err

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Wait for the end; return all that it wrote."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, f"{self.args} does not end: {self.output()}"
            time.sleep(0.05)
        return self.output()

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Processes below it whose title, which Ray sets to what they run, holds ``title``."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """Kill all of its processes at once: a Ray that is asked to end takes ten seconds."""
        with suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(self.pid), *self.processes()]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._client.close()
        shutil.rmtree(self._outputs[0].parent, ignore_errors=True)


class Zygote:
    """Forks a process for each client of its socket, until its parent or its command has ended.

    Args:
        path: of the socket.
        command: to run below it.
    """

    def __init__(self, path: str, command: Sequence[str] = ()) -> None:
        self.parent = os.getppid()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{path}.new")
        self.listener.listen(128)
        self.clients: dict[int, socket.socket] = {}
        self.watch = selectors.DefaultSelector()
        self.watch.register(self.listener, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.ended, self.wake = socket.socketpair()
        self.wake.setblocking(False)
        self.ended.setblocking(False)
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        self.watch.register(self.ended, selectors.EVENT_READ)
        Path(f"{path}.new").rename(path)
        self.command: subprocess.Popen[bytes] | None = None
        if command:
            os.environ["ZYGOTE"] = path
            self.command = subprocess.Popen(command)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, _: self.command.send_signal(number))

    def serve(self) -> int:
        while True:
            for key, _ in self.watch.select(timeout=1):
                if key.fileobj is self.listener:
                    self.accept()
                elif key.fileobj is self.ended:
                    self.ended.recv(4096)
                else:  # a client is gone: what was forked for it goes too
                    self.watch.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
            if self.command is not None and self.command.poll() is not None:
                return self.command.returncode
            if os.getppid() != self.parent:
                for process in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                return 0
            for pid in list(self.clients):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    client = self.clients.pop(pid)
                    if client in {key.fileobj for key in self.watch.get_map().values()}:
                        self.watch.unregister(client)
                        with suppress(OSError):  # its process may have been killed meanwhile
                            client.sendall((code if code >= 0 else 128 - code).to_bytes(4, "big"))
                    client.close()

    def accept(self) -> None:
        client, _ = self.listener.accept()
        size, files, _, _ = socket.recv_fds(client, 4, 8)
        data = client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL) if size else b""
        if not data or len(data) < int.from_bytes(size, "big"):  # its process was killed meanwhile
            for file in [client.detach(), *files]:
                os.close(file)
            return
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            client.close()
            self.leave()
            run(request, files)
        for file in files:
            os.close(file)
        with suppress(OSError):  # a closed connection is noticed below, where the fork is killed
            client.sendall(pid.to_bytes(4, "big"))
        self.clients[pid] = client
        self.watch.register(client, selectors.EVENT_READ, pid)

    def leave(self) -> None:
        """In a forked process: be no zygote."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.watch.close()
        for open_socket in (self.listener, self.ended, self.wake, *self.clients.values()):
            open_socket.close()


class UrandomActorClassID:
    """Random identifiers of Ray's actor classes, from the operating system."""

    @staticmethod
    def from_random() -> ActorClassID:
        from ray import ActorClassID

        return ActorClassID(os.urandom(ActorClassID.size()))


def import_all() -> None:
    """Import what forked processes need.

    Ray's generator of random identifiers is seeded at its first use. That must not be here: all forked processes would
    have the same node, worker and placement group identifiers.
    """
    import ray.actor

    ray.actor.ActorClassID = UrandomActorClassID  # of classes decorated with ray.remote
    for name in PRELOADED:
        importlib.import_module(name)
    modules = importlib.import_module("ray.dashboard.modules")
    for module in pkgutil.walk_packages(modules.__path__, f"{modules.__name__}."):
        importlib.import_module(module.name)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        assert len(set(pool.map(random_id, range(2), chunksize=1))) == 2, "an import has used Ray's random generator"


def random_id(_: int) -> str:
    from ray import NodeID

    return NodeID.from_random().hex()


def enter(namespace: str) -> None:
    """Have this process, and what it starts, live in a network namespace."""
    import ctypes

    with open(f"/run/netns/{namespace}") as file:
        assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())


def read_settings() -> None:
    """Have Ray read settings of this process' environment that it has read in the zygote's."""
    from ray._raylet import Config

    Config.initialize(json.dumps({"AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}))
    sys.modules.pop("ray.serve.scripts", None)  # the options of `serve` have their defaults from variables
    of_serve = {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}
    of_dashboard = sys.argv[0] == "-c" or "/dashboard/" in sys.argv[0]  # it registers its modules once
    if of_serve != zygote_client.of_serve and not of_dashboard:
        forget("ray.serve")
        forget("raypp")
        vars(sys.modules["ray"]).pop("serve", None)


def forget(package: str) -> None:
    """Have a package imported again."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def is_elsewhere(package: str) -> bool:
    """Whether a package that is imported would now come from another folder, such as a job's package of files."""
    spec = importlib.machinery.PathFinder.find_spec(package)
    return package in sys.modules and spec is not None and spec.origin != sys.modules[package].__file__


def run(request: dict[str, Any], files: list[int]) -> None:
    """Be the process that would have run the request's script."""
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, 1000) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(request.get("files", [0, 1, 2]), above, strict=True):
        os.dup2(file, number)
        os.close(file)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    read_settings()
    code = sys.argv.pop(1) if sys.argv[0] == "-c" else ""
    folder = request["folder"] if code else str(Path(sys.argv[0]).resolve().parent)
    paths = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    own = str(Path(__file__).parent)
    sys.path[:] = [folder, *paths, *(path for path in sys.path if path not in {*before, own})]
    if is_elsewhere("raypp"):
        forget("raypp")
    exit_code = 0
    try:
        if code:
            exec(code, {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        exit_code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


if __name__ == "__main__":
    socket_path, namespace, *command = sys.argv[1:]
    if namespace:
        enter(namespace)
    if not command:  # the first one, from which others are forked
        os.environ |= SETTINGS
        zygote_client.of_serve = {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}
        import_all()
        gc.freeze()  # forked processes share what they do not change, and their collector need not look at it
    sys.exit(Zygote(socket_path, command).serve())
