"""The services on a Ray cluster of three machines, each a network namespace of its own on this one: HAProxy on every
node, requests to any of them, and a node that dies."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import yaml
from conftest import Trained, free_port, wait_until
from zygote import ProcessTree, variables

from raypp.bundle.load import load_private
from raypp.bundle.manifest import write_manifest
from raypp.cli.main import main
from raypp.serve.auth import add_token
from raypp.serve.haproxy import ray_settings
from raypp.serve.loaded_model import load_model
from raypp.serve.model_store import publishing

pytestmark = [pytest.mark.ray, pytest.mark.network_namespace]

NUM_NODES = 3  # a head without work, as in a cluster's usual configuration, and two with a replica each
SUBNET = "10.213.57"  # of the bridge between them
BRIDGE = "raypp-test"
HEAD = f"{SUBNET}.1:6379"
CONNECTIONS = 4  # to each node that receives requests


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Nodes:
    """Namespaces ``raypp-test-0``, the head, and so on; node i has the address SUBNET.(i + 1)."""

    environment: dict[str, str]
    zygote: Path
    proxies: list[dict[str, str]] = field(default_factory=list)  # settings of each node's HAProxy
    redis: tuple[str, str] | None = None  # address and password; None without Redis
    started: list[ProcessTree] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)  # of the head

    def run(self, node: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["ip", "netns", "exec", f"{BRIDGE}-{node}", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)

    def start(self, node: int) -> None:
        """Start the head, node 0, or another node."""
        command = [
            "ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address={address(node)}",
            "--object-store-memory=100000000", "--include-log-monitor=false",
        ]  # fmt: skip
        environment = self.environment | variables(self.zygote) | self.proxies[node]
        if node:
            command += [f"--address={HEAD}", "--num-cpus=1"]
        else:
            # A folder for each start: Ray would read in an old one that the cluster runs, as it sees the other nodes.
            folder = Path(tempfile.mkdtemp(prefix="ray-"))
            command += ["--head", "--port=6379", "--num-cpus=0", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
            self.folders.append(folder)
        if not node and self.redis is not None:
            environment["RAY_REDIS_ADDRESS"], password = self.redis
            command.append(f"--redis-password={password}")
        started = ProcessTree(self.zygote, command, environment, namespace=f"{BRIDGE}-{node}")
        self.started.append(started)
        wait_until(lambda: "Ray runtime started" in started.output()[0], started, 60)

    def kill(self, node: int) -> None:
        """End everything on a node at once, as a machine that loses its power."""
        pids = subprocess.run(["ip", "netns", "pids", f"{BRIDGE}-{node}"], capture_output=True, text=True, check=False)
        for number in pids.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(int(number)).kill()

    def replicas(self, node: int) -> int:
        """How many replicas listen on a node for its HAProxy and the others'."""
        listening = self.run(node, "cat", "/proc/net/tcp").stdout.splitlines()[1:]
        ports = [int(line.split()[1].partition(":")[2], 16) for line in listening if line.split()[3] == "0A"]
        return sum(30000 <= port < 30100 for port in ports)


def remove_network() -> None:
    """End and remove what a run of this test has left that was killed."""
    for node in range(NUM_NODES):
        Nodes({}, Path()).kill(node)
        for words in (("link", "del", f"rpp{node}"), ("netns", "del", f"{BRIDGE}-{node}")):
            subprocess.run(["ip", *words], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def address(node: int) -> str:
    return f"{SUBNET}.{node + 1}"


@pytest.fixture
def nodes(zygote: Path, tmp_path: Path) -> Iterator[Nodes]:
    """A Ray cluster over three namespaces, each with an HAProxy of its own."""
    try:
        ip("netns", "add", BRIDGE)
        ip("netns", "del", BRIDGE)
        remove_network()
        ip("link", "add", BRIDGE, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"namespaces need root and the program ip: {getattr(error, 'stderr', error)}")
    token = tmp_path / "cluster-token"
    token.write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")} | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    cluster = Nodes(environment, zygote)
    with ExitStack() as stack:
        stack.callback(ip, "link", "del", BRIDGE)
        ip("addr", "add", f"{SUBNET}.254/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for node in range(NUM_NODES):
            name, outer, inner = f"{BRIDGE}-{node}", f"rpp{node}", f"rppn{node}"
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            stack.callback(ip, "link", "del", outer)  # a namespace outlives its name while a process in it ends
            ip("link", "set", inner, "netns", name)
            ip("link", "set", outer, "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{address(node)}/24", "dev", inner)
            for device in (inner, "lo"):
                ip("-n", name, "link", "set", device, "up")
            stack.callback(cluster.kill, node)
        cluster.redis = stack.enter_context(running_redis())
        # One machine's files: each HAProxy has its own folder, which on several machines lies at the same place.
        cluster.proxies = [stack.enter_context(ray_settings()) for _ in range(NUM_NODES)]
        for node in range(NUM_NODES):  # one after the other: they write into one folder, as machines do not
            cluster.start(node)
        yield cluster
    for folder in cluster.folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running_redis() -> Iterator[tuple[str, str] | None]:
    """A Redis on the bridge for the state of the head; yields its address and password, or None without Redis."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    password = secrets.token_hex(16)
    host, port = f"{SUBNET}.254", str(free_port())
    command = [program, "--bind", host, "--port", port, "--requirepass", password, "--save", ""]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"{host}:{port}", password
    finally:
        server.kill()
        server.wait()


class RequestThread(threading.Thread):
    """Sends protected images to one node, one after the other, and checks every answer against its own image."""

    def __init__(self, node: int, token: str, images: np.ndarray, classes: list[int], versions: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.url, self.images, self.classes = f"http://{address(node)}:8000", images, classes
        self.versions = list(versions.items())
        self.headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/x-npy"}
        self.stop = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.failed: list[float] = []

    def run(self) -> None:
        with httpx.Client(timeout=45, trust_env=False) as client:
            number = 0
            while not self.stop.is_set():
                number = (number + 1) % len(self.images)
                body = io.BytesIO()
                np.save(body, self.images[number])
                protection, version = self.versions[number % len(self.versions)]
                headers = self.headers | {"Raypp-Protection": protection}
                began = time.monotonic()
                try:
                    answer = client.post(f"{self.url}/classifier/v1/classify", content=body.getvalue(), headers=headers)
                    outcome = str(answer.status_code)
                    right = self.classes[number], version
                    if outcome == "200" and (answer.json()["images"][0]["index"], answer.json()["model"]) != right:
                        outcome = "wrong"
                except httpx.HTTPError as error:
                    outcome = type(error).__name__
                self.outcomes[outcome] += 1
                if outcome != "200":
                    self.failed.append(began)


def test_a_node_that_dies_costs_the_requests_on_their_way_to_it(
    nodes: Nodes, trained: Trained, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """Before that, two replicas behind HAProxy answer for two protections, each with the fitting version."""
    token = add_token(tmp_path / "tokens.json", "test", ["classify"])
    config, tokens = tmp_path / "serve_config.yaml", str(tmp_path / "tokens.json")
    bundle, repository = shutil.copytree(trained.bundle, tmp_path / "bundle"), tmp_path / "repository"
    with publishing(bundle, repository) as first:
        pass
    public = bundle / "public" / "protection.json"
    public.write_text(public.read_text() + "\n")  # another protection that gives the same images
    for part in ("public", ""):
        write_manifest(bundle / part)
    with publishing(bundle, repository) as second:
        pass
    versions = {model.protection: model.version for model in (load_model(first.location), load_model(second.location))}
    main(["serve", str(repository), "--host", "0.0.0.0", "--token-file", tokens, "--output", str(config)])
    written = yaml.safe_load(config.read_text())
    # As serve_config.yaml shows it: the controller gets the policy from the application, and needs no raypp.
    policy = {"policy_function": "raypp.serve.scaling:scale_by_images"}
    autoscaling = {"min_replicas": 2, "max_replicas": 2, "policy": policy}
    written["applications"][0]["deployments"] = [
        {"name": "Classifier", "num_replicas": "auto", "autoscaling_config": autoscaling}
    ]
    config.write_text(yaml.safe_dump(written))
    deployed = nodes.run(0, "serve", "deploy", str(config), "--address", "http://127.0.0.1:8265")
    assert deployed.returncode == 0, deployed.stderr

    def answers(node: int) -> bool:
        """Whether it takes requests, and says so to load balancers and Kubernetes."""
        with contextlib.suppress(httpx.HTTPError), httpx.Client(timeout=5, verify=False) as client:
            statuses = [
                client.get(f"http://{address(node)}:8000/{path}").status_code
                for path in ("classifier/v1/model", "-/healthz")
            ]
            return statuses == [401, 200]
        return False

    wait_until(lambda: [nodes.replicas(node) for node in range(NUM_NODES)] == [0, 1, 1], nodes.started[0], 120)
    wait_until(lambda: all(answers(node) for node in range(NUM_NODES)), nodes.started[0], 30)
    with httpx.Client(timeout=3) as outside:  # only Serve's own ports listen for others, and replicas' behind a token
        for port in (8404, 9101, 8265):
            with pytest.raises(httpx.ConnectError):
                outside.get(f"http://{address(0)}:{port}/")
        assert outside.get(f"http://{address(1)}:30000/classifier/v1/model").status_code == 401
    private = load_private(bundle)
    images = private.sample.permute(0, 2, 3, 1).numpy()
    classes = private.sample_classes.tolist()
    threads = [RequestThread(node, token, images, classes, versions) for node in (0, 1) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    before = sum((thread.outcomes for thread in threads), Counter())
    assert set(before) == {"200"}
    died = time.monotonic()
    nodes.kill(2)
    time.sleep(6)
    for thread in threads:
        thread.stop.set()
    for thread in threads:
        thread.join(60)
    outcomes = sum((thread.outcomes for thread in threads), Counter())
    failed = sorted(began for thread in threads for began in thread.failed)
    assert outcomes["wrong"] == 0
    assert outcomes["200"] - before["200"] > 50
    assert len(failed) <= len(threads), outcomes  # one on its way for each connection
    assert all(abs(began - died) < 3 for began in failed)

    with subtests.test("a head that dies"):
        if nodes.redis is None:
            pytest.skip("redis-server is not installed: without Redis, the loss of the head ends a cluster")
        nodes.kill(0)
        thread = RequestThread(1, token, images, classes, versions)
        thread.start()
        time.sleep(6)
        nodes.start(0)
        wait_until(lambda: answers(0), nodes.started[-1], 60)
        thread.stop.set()
        thread.join(60)
        assert set(thread.outcomes) == {"200"}, "requests failed while the cluster had no head"
        assert thread.outcomes["200"] > 50
