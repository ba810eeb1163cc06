"""What tests share: a configuration that trains in a second, a run trained with it once, and one Ray cluster."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import pytest
from commands import Command, fork_server
from hypothesis import settings
from zygote import ProcessTree, variables
from zygote import zygote as start_zygote

from raypp.utils import runtime

if TYPE_CHECKING:  # torch takes seconds, and the process that only hands tests to others does not need it
    from raypp.config.schema import Config
    from raypp.serve.model_store import ModelManager
    from raypp.training.protection_task import TrainResult

DEV_EXAMPLES = 20
settings.register_profile("dev", max_examples=DEV_EXAMPLES, deadline=None)
settings.register_profile("ci", max_examples=150, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
few_examples = settings(max_examples=settings().max_examples // 4)
"""Settings of an expensive test: a quarter of the examples."""
# Containers often forbid to keep bytecode. Each process that tests start would compile all of torch and Ray anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# The processes that share the tests fill all cores; a second thread of one would wait for the cores of another.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Ray's own monitoring and workers that no task uses take a tenth of the suite's processor time.
os.environ |= {
    "METRICS_RECORD_INTERVAL_S": "3600",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # looks for new files every two seconds instead of all the time
    "LOG_NAME_UPDATE_INTERVAL_S": "2",
}
# The Ray that tests share asks for this token. Ray reads the mode while it is imported, also where commands are forked.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Seconds between a node's SIGTERM and its end. Ray reads it while it is imported.
os.environ["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "6"
runtime.apply()  # before the zygote imports Ray

ROOT = Path(__file__).parents[1]
FAST_SECONDS = 2.0
TINY = {
    "data.source.num_train": "60",
    "data.source.num_test": "30",
    "data.image_size": "[16, 16]",
    "data.num_val": "20",
    "protection.width": "4",
    "protection.depth": "2",
    "train.batch_size": "20",
    "train.epochs": "2",
    "train.plain_epochs": "1",
    "train.eval_batch_size": "15",
    "train.precision": "fp32",
    "train.alpha": "0.005",
    "train.optimizer.lr": "0.1",
    "train.schedule": "{name: one_cycle, warmup: 0.25, final: 0.0}",
}

Tiny = Callable[..., "Config"]
Value = TypeVar("Value")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that use Ray, which take longest; tests of a file share its fixtures."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(f"ray-{file}" if item.get_closest_marker("ray") else file))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Never what bytes hold: they may differ between the processes that collect the tests, as a time in them does."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that takes more than :data:`FAST_SECONDS` and has no marker that says so."""
    began, waited = time.monotonic(), _seconds_without_cpu()
    yield
    seconds = time.monotonic() - began - (_seconds_without_cpu() - waited)
    many_examples = settings().max_examples > DEV_EXAMPLES and hasattr(getattr(item, "obj", None), "hypothesis")
    allowed = many_examples or any(item.get_closest_marker(name) for name in ("ray", "slow"))
    if seconds > FAST_SECONDS and not allowed:
        pytest.fail(f"takes {seconds:.1f} s; mark it as slow, or make it faster than {FAST_SECONDS} s", pytrace=False)


def _seconds_without_cpu() -> float:
    """For how long this thread was ready to run while other processes had the cores; 0.0 where Linux does not say."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test itself draws depends neither on the process (torch's first seed is random) nor on other tests."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_methods() -> Iterator[None]:
    """Methods that a test registers end with it."""
    from raypp.attacks import ATTACKS
    from raypp.protections import PROTECTIONS

    before = [(registry, dict(registry._classes)) for registry in (ATTACKS, PROTECTIONS)]
    yield
    for registry, classes in before:
        registry._classes = classes


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def tiny_flags(storage: Path, **changes: object) -> list[str]:
    """Flags that make the preset quickstart tiny; ``train__epochs=1`` stands for ``--train.epochs 1``; another
    ``protection`` comes without the sizes of the U-Net."""
    settings = TINY | {key.replace("__", "."): str(value) for key, value in changes.items()}
    if "protection" in settings:
        settings = {key: value for key, value in settings.items() if not key.startswith("protection.")}
    pairs = [(f"--{key}", value) for key, value in settings.items()]
    return [word for pair in pairs for word in pair] + ["--cluster.storage", str(storage)]


def override(flags: Sequence[str], others: Sequence[str]) -> list[str]:
    """Flags with their values, those of ``others`` in place of those of the same setting: a flag is given once."""
    pairs = dict(zip(flags[::2], flags[1::2], strict=True)) | dict(zip(others[::2], others[1::2], strict=True))
    return [word for pair in pairs.items() for word in pair]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """Makes tiny configurations whose runs lie in ``tmp_path``."""
    import torch._dynamo  # noqa: F401 (an optimizer's first step imports it, for seconds that are no test's own)

    from raypp.config.presets import load_config

    return lambda **changes: load_config("quickstart", flags=tiny_flags(tmp_path, **changes))


@dataclass(frozen=True)
class Trained:
    """A finished run and the networks that it left."""

    config: Config
    run: Path
    fit: TrainResult

    @property
    def bundle(self) -> Path:
        return self.run / "bundle"

    @cached_property
    def live(self) -> ModelManager:
        """The bundle as a service holds it."""
        from services import load_live

        return load_live(self.bundle)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """One tiny joint run; tests copy what they change, an attack's bundle too."""
    import torch

    from raypp.config.presets import load_config
    from raypp.experiments.training_run import open_run, train_locally
    from raypp.training.protection_task import fit
    from raypp.training.reporter import Reporter
    from raypp.utils.progress import ProgressDisplay

    cpu = torch.device("cpu")
    storage = tmp_path_factory.mktemp("runs")
    config = load_config("quickstart", flags=tiny_flags(storage))
    display = ProgressDisplay(quiet=True)
    with open_run(config, "tiny") as run:
        train_locally(run, display, cpu)
        # The run is over, so this only takes up its last checkpoint.
        left = fit(run.config, Reporter(run.storage, display, cpu), run.phi)
    made = Trained(config, storage / "tiny", left)
    before = _files(made.run)
    yield made
    assert _files(made.run) == before, "a test has changed what all share"


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes that have imported already what takes seconds."""
    return fork_server()


@pytest.fixture(scope="session")
def zygote() -> Path:
    """The socket of the process from which Ray's are forked."""
    return start_zygote()


class Cluster:
    """A head node of two CPUs on this machine, and the environment of its clients.

    It listens on loopback only and asks every client for its token.
    """

    def __init__(self, client: dict[str, str], head: ProcessTree, metrics_port: int) -> None:
        self.client, self.head, self.metrics_port = client, head, metrics_port
        self.started: list[Command] = []

    def training_workers(self) -> list[psutil.Process]:
        return self.head.processes("RayTrainWorker")

    def popen(self, arguments: list[str], folder: Path = ROOT) -> Command:
        command = Command(arguments, self.client, folder)
        self.started.append(command)
        return command

    def run(self, arguments: list[str], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = self.popen(arguments, folder)
        out, err = command.communicate(timeout=400)
        return subprocess.CompletedProcess(arguments, command.wait(), out, err)


@contextmanager
def start_cluster(zygote: Path) -> Iterator[Cluster]:
    """A cluster whose processes have this process' environment."""
    port, dashboard, agent, metrics = (free_port() for _ in range(4))
    client = os.environ | {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    scripts = Path(sys.executable).parent
    client["PATH"] = f"{scripts}{os.pathsep}{client['PATH']}"
    client["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process less for each run; its one node never leaves
    start = [
        "ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", "--disable-usage-stats",
    ]  # fmt: skip
    surroundings = {key: value for key, value in client.items() if key != "RAY_ADDRESS"} | variables(zygote)
    surroundings["RAY_metrics_report_interval_ms"] = "2000"  # 10,000 by default
    # --block keeps the whole node below one process of ours: "ray stop" would end other clusters on this machine too.
    head = ProcessTree(zygote, start, surroundings)
    started = Cluster(client, head, metrics)
    try:
        wait_until(lambda: listens(port) and listens(dashboard), head, 120)
        yield started
    finally:
        for command in started.started:  # what a failed test has left running
            command.kill()
        head.kill()


@pytest.fixture(scope="session")
def cluster(zygote: Path) -> Iterator[Cluster]:
    with start_cluster(zygote) as started:
        yield started


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's cache is empty, and nothing can be downloaded into it."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.urlopen", fail)


_ports: set[int] = set()  # that tests of this process use or have used


def free_port() -> int:
    """A port that nobody listens on and that no other call gets, in none of the processes that share the tests."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # A worker that replaces another has a higher number.
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % count
    while True:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port: int = server.getsockname()[1]
        if port not in _ports and port // 2 % count == own:  # Linux gives ports of one parity here
            _ports.add(port)
            return port


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(
    condition: Callable[[], Value], process: subprocess.Popen[Any] | Command | ProcessTree, seconds: float = 240
) -> Value:
    """Wait for a true value while a process runs and return it; fail with the process' output if that ends first."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if process.poll() is not None:
            pytest.fail(f"the run ended early with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return value
