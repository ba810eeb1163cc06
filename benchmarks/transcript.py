"""Record docs/results/cluster-transcript.md: from training to an endpoint on a cluster of three nodes.

    python benchmarks/transcript.py

It trains, publishes, serves, trains again while a node is drained, follows the live swap, and kills the head, all by
`ray job submit` and `serve deploy`. Each node is a network namespace of this machine, so it needs root and the program
`ip`; the part with the killed head needs `redis-server`. It takes 5 to 8 minutes on two cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raypp.client.http import Client
from raypp.client.session import RemoteError
from raypp.experiments.run_folder import cpu_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "cluster-transcript.md"
BRIDGE, SUBNET = "raypp-run", "10.213.58"  # .1 is the head, .2 and .3 do the work, .254 is this machine with Redis
CPUS = 3  # of a worker node, as Ray counts them: two for a worker of the training, one for a replica
DRAIN_SECONDS = 20  # notice that a drained node gets; Ray's default is 30
SMALL = {
    "data": {"image_size": [16, 16], "num_val": 100, "source": {"num_train": 1600, "num_test": 300}},
    "protection": {"width": 4, "depth": 2},
    "train": {"optimizer": {"name": "muon", "lr": 0.02}},
    # Ray Train counts a replica's CPU as free. With one CPU for a worker it would start two on the node that is left.
    "cluster": {"num_workers": 2, "min_workers": 1, "cpus_per_worker": 2, "max_failures": -1, "resize_seconds": 5},
}
JOB = "ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python"
URL = "http://127.0.0.1:8000"  # on each node; clients send tokens over HTTPS or to their own machine only
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
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS),
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
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
        # Machines have their own disks; here each node has its own folder, and a small object store.
        hidden = [f"--temp-dir={self.folder / f'n{node}'}", "--object-store-memory=100000000"]
        log = (self.folder / f"node-{node}.log").open("wb")
        command = ["ip", "netns", "exec", f"{BRIDGE}-{node}", *words, *hidden]
        # The machine's name leads to its loopback address, by which workers on two nodes do not reach each other.
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


def rows_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# The client


def load(token_file: Path, report: Path) -> None:
    """Classify images of one node's service until SIGTERM; the report is rewritten after each request."""
    outcomes: Counter[str] = Counter()
    models: list[str] = []
    longest, images = 0.0, list(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    with Client(URL, token=token_file.read_text().strip(), patience=60, cache=report.with_suffix(".cache")) as client:
        while True:
            began = time.monotonic()
            try:
                predictions = client.classify(images)
                outcomes["answered"] += 1
                models += [model for model in {p.model for p in predictions} if model not in models]
            except RemoteError as error:
                outcomes[str(error)] += 1
            longest = max(longest, time.monotonic() - began)
            temporary = report.with_suffix(".tmp")
            temporary.write_text(json.dumps({"outcomes": outcomes, "models": models, "longest_s": round(longest, 2)}))
            temporary.replace(report)
            time.sleep(0.05)


def read_report(report: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {"outcomes": {}, "models": []}
    return content


def show_report(page: Page, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Requests of the client between two reports, and the versions of all its answers."""
    counts = Counter(after["outcomes"])
    counts.subtract(before["outcomes"])
    failed = sum(count for outcome, count in counts.items() if outcome != "answered")
    page.add(f"requests answered: {counts['answered']}, failed: {failed}, longest: {after['longest_s']} s")
    page.add(f"versions that answered: {', '.join(after['models'])}")


# The parts of the transcript


def start_cluster(page: Page, nodes: Nodes, redis: bool) -> None:
    page.heading("Three nodes")
    page.prose(
        f"The head runs no tasks. Each other node has {CPUS} CPUs by Ray's count; all three share the same cores. Each "
        "has its own `--temp-dir`, which is left out here. "
        + ("The head keeps its state in Redis (`RAY_REDIS_ADDRESS`), which runs outside the cluster." if redis else "")
    )
    with page.block():
        for node in (1, 2, 3):
            page.command(nodes.start(node))


def first_model(session: Session, folder: Path) -> None:
    page = session.page
    page.heading("First model: two commands")
    page.prose(
        "Once per cluster: a token for a client, and the configuration of the service, which names a repository."
    )
    with page.block():
        session.run(f"raypp token alice --token-file {folder}/tokens.json > {folder}/alice.token")
        (folder / "models").mkdir()
        session.run(f"cat {folder}/serve_config.yaml", last=40)
    page.prose(f"Training, its settings in `{SHARED}/small.yaml`, on two workers. The bundle is published at the end.")
    with page.block():
        session.run(f"cat {folder}/small.yaml", last=40)
        session.run(
            f"{JOB} jobs/train.py quickstart --config {folder}/small.yaml --name first --storage {folder}/runs "
            f"--publish {folder}/models"
        )
    page.prose("Serving: two replicas, one per node.")
    with page.block():
        session.run(f"serve deploy {folder}/serve_config.yaml")
        wait_for(lambda: is_running(session), 120, "the service")
        session.run("serve status", keep="status:|message:|replica_states|RUNNING", last=12)
        session.run(f"raypp classify {URL} docs/images/demo.png --token-file {folder}/alice.token --top 2", node=2)


def is_running(session: Session) -> bool:
    """Whether the service runs with both replicas."""
    done = session.nodes.popen(1, "bash", "-c", "serve status 2> /dev/null")
    output, _ = done.communicate(timeout=60)
    applications = (yaml.safe_load(output) or {}).get("applications", {}) if done.returncode == 0 else {}
    service = applications.get("classifier", {})
    replicas = service.get("deployments", {}).get("Classifier", {}).get("replica_states", {})
    return bool(service.get("status") == "RUNNING" and replicas == {"RUNNING": 2})


def second_model(session: Session, folder: Path, report: Path) -> None:
    page, nodes, run = session.page, session.nodes, folder / "runs" / "second"
    page.heading("Each later model: one command, here while a node is drained")
    page.prose("A client on node 2 sends requests all the time, from here to the end of this page.")
    with page.block():
        job = session.begin(
            f"{JOB} jobs/train.py quickstart --config {folder}/small.yaml --name second --storage {folder}/runs "
            f"--publish {folder}/models --seed 1 --train.epochs 20"
        )
        session.wait(job, lambda: len(rows_of(run)) >= 6, "six epochs")
        row = rows_of(run)[-1]
        page.add(f"# epoch {row['epoch']} of {row['phase']}, {row['world']} workers: SIGTERM to node 3")
        saved = checkpoints_while_draining(nodes, run)
        page.add(
            f"# node 3 has left after {saved[0]:.0f} s; checkpoints saved meanwhile: {', '.join(saved[1]) or 'none'}"
        )
        session.wait(job, lambda: rows_of(run)[-1]["world"] == 1, "one worker")
        row = rows_of(run)[-1]
        page.add(f"# epoch {row['epoch']} of {row['phase']}: {row['world']} worker")
        session.finish(job)
    rows = [(row["phase"], row["epoch"]) for row in rows_of(run)]
    assert len(rows) == len(set(rows)), "an epoch was reported twice"
    page.prose(f"The metrics hold {len(rows)} epochs, each once. The service has switched to the new bundle:")
    active = json.loads((folder / "models" / "live.json").read_text())["version"]
    wait_for(lambda: active in read_report(report)["models"], 60, "the live swap")
    with page.block():
        show_report(page, {"outcomes": {}}, read_report(report))
        session.run(f"cat {folder}/models/live.json")
        page.command(nodes.start(3))
        wait_for(lambda: is_running(session), 120, "the second replica")
        page.add("# node 3 has a replica again")


def checkpoints_while_draining(nodes: Nodes, run: Path) -> tuple[float, list[str]]:
    """Drain node 3 and wait until it has left; seconds, and the checkpoints that appeared meanwhile."""

    def names() -> set[str]:
        return {path.name for path in (run / "checkpoints").glob("epoch_*")}

    known, seen, began = names(), set[str](), time.monotonic()
    process = nodes.running.pop(3)
    process.terminate()  # what Kubernetes does, and a handler of a spot notice
    while process.poll() is None and time.monotonic() < began + 90:
        seen |= names()
        time.sleep(0.1)
    seconds = time.monotonic() - began
    nodes.kill(3)
    new = sorted(seen - known)
    parts = [name for name in new if "_part_" in name]
    return seconds, parts or new[:2]


def killed_head(session: Session, folder: Path, report: Path) -> None:
    page, nodes = session.page, session.nodes
    page.heading("A killed head")
    page.prose("Every process of the head ends by SIGKILL, among them Serve's controller. Node 2 goes on answering.")
    with page.block():
        before = read_report(report)
        page.command("kill -9 ...   # on the head")
        nodes.kill(1)
        time.sleep(10)
        page.add("# after 10 s without a head")
        show_report(page, before, read_report(report))
    page.prose("The same command starts the head again. It reads its state from Redis, and the cluster takes commands.")
    with page.block():
        page.command(nodes.start(1))
        wait_for(lambda: is_running(session), 120, "the service")
        session.run("serve status", keep="status:|message:|replica_states|RUNNING", last=12)
    page.prose("A job publishes the first model again, and the service switches back to it:")
    with page.block():
        session.run(f"{JOB} jobs/publish.py {folder}/runs/first {folder}/models")
        first = json.loads((folder / "models" / "live.json").read_text())["version"]
        command = ["raypp", "classify", URL, "docs/images/demo.png", "--token-file", f"{folder}/alice.token"]
        session.run(shlex.join(command), node=2)
        wait_for(lambda: read_report(report)["outcomes"]["answered"] > before["outcomes"]["answered"], 60, "answers")
        show_report(page, before, read_report(report))
        page.add(f"active: {first}")


def write_files(folder: Path) -> None:
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["host"] = "0.0.0.0"
    (application,) = config["applications"]
    application["args"] |= {"bundle": f"{folder}/models", "tokens": f"{folder}/tokens.json"}
    scale = {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}, "max_replicas_per_node": 1}
    application["deployments"] = [{"name": "Classifier", **scale}]
    (folder / "serve_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def record(page: Page, folder: Path) -> None:
    page.add("# From training to an endpoint, recorded on a cluster")
    page.prose(
        "Commands and their output on a Ray cluster of three nodes: training, publishing, serving, a second training "
        "while a node is drained, the live swap, and a killed head. "
        f"`{SHARED}` is the folder that every node sees. Lines of Ray's own log are left out; lines that begin with # "
        "are remarks of the script."
    )
    page.prose(
        f"Recorded by `python benchmarks/transcript.py` on {datetime.now(UTC):%Y-%m-%d}, {cpu_name()}, ray "
        f"{version('ray')}, torch {version('torch')}. The nodes are network namespaces of one machine."
    )
    with ExitStack() as stack:
        nodes = Nodes(folder, stack)
        redis = nodes.with_redis(stack)
        session, report = Session(page, nodes), folder / "load.json"
        write_files(folder)
        start_cluster(page, nodes, redis)
        first_model(session, folder)
        words = [sys.executable, __file__, "load", f"{folder}/alice.token", str(report)]
        client = nodes.popen(2, *words)
        stack.callback(client.kill)
        wait_for(lambda: read_report(report)["models"] or client.poll() is not None, 60, "the client")
        second_model(session, folder, report)
        if redis:
            killed_head(session, folder, report)
        else:
            page.heading("A killed head")
            page.prose("Not recorded: `redis-server` was not installed. Without Redis the cluster ends with its head.")
        page.add("\n## Next\n\n- [Run on a cluster](../how-to/run-on-a-cluster.md) · [Publish](../how-to/publish.md)")


def main() -> None:
    if sys.argv[1:2] == ["load"]:
        load(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    if os.geteuid() or shutil.which("ip") is None:
        sys.exit("network namespaces need root and the program ip")
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # short: sockets lie in it
    page = Page(folder)
    try:
        record(page, folder)
        page.save()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(f"wrote {PAGE.relative_to(ROOT)} in {time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main()
