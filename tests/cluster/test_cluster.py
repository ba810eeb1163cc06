"""A cluster of three nodes on this machine: jobs end to end, nodes that leave, drivers that die.

The head runs no tasks, as in the shipped configurations; the two others have one CPU each.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from conftest import ROOT, Trained, free_port, tiny_flags, wait_until
from zygote import ProcessTree, variables

from raypp.bundle.load import load_private, load_public
from raypp.experiments import attack_plan, attack_run
from raypp.serve.auth import add_token
from raypp.serve.model_store import publishing
from raypp.training.checkpoint import list_checkpoints
from raypp.utils.storage import Storage

pytestmark = pytest.mark.ray

PIPE = subprocess.PIPE


class Nodes:
    """Three nodes with addresses 127.0.0.1 to .3, and the environment of their clients."""

    def __init__(self, zygote: Path) -> None:
        self.zygote, self.port, self.dashboard = zygote, free_port(), free_port()
        scripts = Path(sys.executable).parent
        self.client = (
            os.environ
            | variables(zygote)
            | {
                "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_ADDRESS": f"127.0.0.1:{self.port}",
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
                "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{self.dashboard}",  # for `serve`
                # A node that left is noticed sooner than on a cluster whose network may pause for a while.
                "RAY_health_check_period_ms": "1000",
                "RAY_health_check_failure_threshold": "3",
                "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
                "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
            }
        )
        # A folder for each node, as on machines of their own: in a shared one they unpack a job's package over each
        # other, under the feet of its driver. A short one: sockets lie there.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.running: dict[int, ProcessTree] = {}

    def start(self, number: int) -> None:
        """Start node 1, the head, or another."""
        ip = f"127.0.0.{number}"
        arguments = [
            "ray", "start", "--block", f"--node-ip-address={ip}", f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0",
            "--disable-usage-stats", f"--temp-dir={self.folder / str(number)}",
        ]  # fmt: skip
        if number == 1:
            arguments += ["--head", "--num-cpus=0", f"--port={self.port}"]
            arguments += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"]
        else:
            arguments += [f"--address=127.0.0.1:{self.port}", "--num-cpus=1"]
        environment = {key: value for key, value in self.client.items() if key != "RAY_ADDRESS"}
        node = self.running[number] = ProcessTree(self.zygote, arguments, environment)
        # One after the other: nodes that start together on two cores give up waiting for themselves.
        wait_until(lambda: "Ray runtime started" in node.output()[0], node, 120)

    def kill(self, number: int) -> None:
        """End all processes of a node at once, as when a spot instance ends without a warning."""
        self.running.pop(number).kill()

    def announce_end(self, number: int) -> ProcessTree:
        """Have a node drain and end, as Kubernetes does with a pod; its processes are the caller's to end."""
        node = self.running.pop(number)
        node.send_signal(signal.SIGTERM)
        return node

    def holds(self, number: int, title: str) -> bool:
        """Whether a process of a node has a title, which Ray sets to what it runs, that holds ``title``."""
        return bool(self.running[number].processes(title))

    def job(self, name: str, *more: str, submission: str | None = None) -> subprocess.Popen[str]:
        """Submit the job as its docstring says, with other arguments than its example's."""
        text = (ROOT / "jobs" / f"{name}.py").read_text()
        line = next(part.strip() for part in text.splitlines() if part.strip().startswith("ray job submit"))
        before, _, _ = line.partition(f"jobs/{name}.py")
        arguments = [*before.split(), f"jobs/{name}.py", *more]
        if submission is not None:
            arguments[3:3] = ["--submission-id", submission]
        return subprocess.Popen(arguments, env=self.client, stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT)

    def stop(self, submission: str, process: subprocess.Popen[str]) -> str:
        """Stop a job as its user would; return what it printed."""
        subprocess.run(["ray", "job", "stop", submission], env=self.client, check=True, capture_output=True, timeout=90)
        out, _ = process.communicate(timeout=90)
        return out

    def done(self, process: subprocess.Popen[str]) -> str:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, out + err
        return out


@pytest.fixture(scope="module")
def head(zygote: Path) -> Iterator[Nodes]:
    cluster = Nodes(zygote)
    try:
        cluster.start(1)
        yield cluster
    finally:
        for number in list(cluster.running)[::-1]:
            cluster.kill(number)
        shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture
def nodes(head: Nodes) -> Nodes:
    """All three, those started again that a test ended."""
    for number in (2, 3):
        if number not in head.running:
            head.start(number)
    return head


@pytest.fixture
def two_nodes(head: Nodes) -> Nodes:
    """The head and at least one that works."""
    if not {2, 3} & head.running.keys():
        head.start(2)
    return head


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def epochs_of(folder: Path) -> list[tuple[str, int]]:
    return [(row["phase"], row["epoch"]) for row in rows_of(folder)]


def train_flags(tmp_path: Path, name: str, epochs: int, **changes: object) -> list[str]:
    changes = {"train__epochs": epochs} | changes
    return ["quickstart", "--name", name, *tiny_flags(tmp_path, **changes)]


def test_a_search_waits_for_nodes_and_spreads_over_them(head: Nodes, tmp_path: Path) -> None:
    """A cluster that scales begins without any. Trials side by side on both, and their best bundle attacked."""
    nodes = head
    for number in nodes.running.keys() & {2, 3}:
        nodes.kill(number)
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        json.dumps({"num_queries": 20, "curve": False, "reference_epochs": 0, "attacks": {"known_gallery": {}}})
    )
    flags = [
        "--storage", str(tmp_path), "--name", "search", "--search.num_trials", "4", "--search.scheduler", "none",
        "--search.max_concurrent", "2", "--cluster.notice_seconds", "2",
        "--search.attack", "{width: 4, train: {epochs: 1}}", "--search.space.protection.skips", "[0, 1, 2]",
        "--search.suite", str(suite), "--search.num_attacked", "1",
        *(flag for flag in tiny_flags(tmp_path, train__epochs=15) if flag not in ("--cluster.storage", str(tmp_path))),
    ]  # fmt: skip
    process = nodes.job("tune", "quickstart", *flags)
    assert process.stdout is not None
    for sentence in ("waiting for it to grow", "cluster: a trial waits for 1 CPU; the cluster has 0 CPUs (0 free)"):
        assert any(sentence in line for line in process.stdout), "the job does not name the resources that it waits for"
    nodes.start(2)
    nodes.start(3)
    for number in (2, 3):
        wait_until(partial(nodes.holds, number, "ImplicitFunc"), process)
    nodes.done(process)
    summary = json.loads((tmp_path / "search" / "search.json").read_text())
    assert len(list((tmp_path / "search").glob("trials/*/trial.json"))) == 4
    assert len(summary["scorecards"]) == 1
    for name in summary["best"]:
        assert load_public(tmp_path / "search" / "best" / name).image_size == (16, 16)
    assert (tmp_path / "search" / "report" / "report.html").stat().st_size > 10_000


def test_the_notice_that_a_node_leaves_is_used_for_a_checkpoint(nodes: Nodes, tmp_path: Path) -> None:
    """Within an epoch, before the node is gone; training continues behind it on the node that is left.

    This is before the test that kills a driver: for 3 minutes after that, Ray 2.60 reserves CPUs for the killed run,
    and an elastic one waits with a busy core.
    """
    run = Storage(tmp_path / "run")
    # The second epoch takes far longer than the notice needs to reach the workers.
    changes = {"data__source__num_train": 920, "train__batch_size": 4, "train__checkpoint_seconds": 10_000}
    changes |= {"train__plain_epochs": 1, "cluster__num_workers": 2, "cluster__min_workers": 1}
    process = nodes.job("train", *train_flags(tmp_path, "run", 50, **changes), submission="drained")
    wait_until(lambda: rows_of(tmp_path / "run"), process)
    workers = {worker.pid for worker in nodes.running[2].processes("RayTrainWorker")}
    assert list_checkpoints(run) == ["epoch_0001"]
    node = nodes.announce_end(3)
    try:
        wait_until(lambda: "_part_" in list_checkpoints(run)[0], process)
        assert node.processes("RayTrainWorker"), "the checkpoint was written after the node's end"
        saved = list_checkpoints(run)[0]
        wait_until(lambda: node.poll() is not None, process)
    finally:
        node.kill()
    wait_until(lambda: {w.pid for w in nodes.running[2].processes("RayTrainWorker")} - workers, process)
    output = nodes.stop("drained", process)
    assert "of the workers' nodes will leave in" in output
    # The new group stops after its first step. Names sort as what they stand for.
    stopped = list_checkpoints(run)[0]
    assert f"stopped after checkpoint {stopped}; continue with --resume" in output
    assert "epoch_0001" < saved < stopped


def test_a_run_outlives_nodes_a_stopped_job_and_a_killed_driver(nodes: Nodes, tmp_path: Path) -> None:
    """Elastic, it shrinks and grows with its cluster; of a fixed size, it waits. No epoch that was checkpointed is
    trained again."""
    folder = tmp_path / "run"
    histories: list[list[dict[str, Any]]] = []  # the rows before each event
    changes = {"data__source__num_train": 200, "train__plain_epochs": 1, "cluster__num_workers": 2}
    changes["cluster__notice_seconds"] = 2
    # More epochs than any machine trains while a node starts and Ray looks for it; what is left is cut off.
    arguments = train_flags(tmp_path, "run", 5000, **changes, cluster__min_workers=1, cluster__resize_seconds=1)
    process = nodes.job("train", *arguments, submission="elastic")
    # It may begin with one worker, if a node has just joined.
    wait_until(lambda: [row["world"] for row in rows_of(folder)[-3:]] == [2, 2, 2], process)
    assert nodes.holds(1, "ray::ProgressActor"), "messages to the driver would be lost with another node"
    nodes.kill(3)
    histories.append(rows_of(folder)[:-1])
    wait_until(lambda: rows_of(folder)[-1]["world"] == 1, process)
    nodes.start(3)
    wait_until(lambda: rows_of(folder)[-1]["world"] == 2, process)

    output = nodes.stop("elastic", process)
    assert f"stopped after checkpoint {list_checkpoints(Storage(folder))[0]}; continue with --resume" in output
    assert "Attempting to start training worker group of size 2" in output, "a job has Ray's own lines"
    histories.append(rows_of(folder))
    time.sleep(3)
    assert rows_of(folder) == histories[-1], "a stopped job still trains"

    # Of a fixed size from here on: Ray 2.60 lets an elastic run wait for 3 minutes after a driver that was killed.
    epochs = len(histories[-1]) + 10
    arguments = [*train_flags(tmp_path, "run", epochs, **changes), "--resume"]
    process = nodes.job("train", *arguments)
    wait_until(lambda: len(rows_of(folder)) >= len(histories[-1]) + 2, process)
    nodes.kill(3)
    wait_until(lambda: not nodes.holds(2, "RayTrainWorker"), process)
    histories.append(rows_of(folder))
    assert process.stdout is not None
    assert any("training on 2 workers waits for 2 CPUs" in line for line in process.stdout)
    nodes.start(3)
    wait_until(lambda: len(rows_of(folder)) > len(histories[-1]), process)
    (driver,) = [part for part in nodes.running[1].processes("jobs/train.py") if "python" in part.name()]
    driver.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    histories.append(rows_of(folder))
    assert len(histories[-1]) < epochs + 1, "the run was over before its driver was killed"

    nodes.done(nodes.job("train", *arguments))
    rows = rows_of(folder)
    assert epochs_of(folder) == [("plain", 1), *(("joint", n + 1) for n in range(epochs))]
    for before in histories:
        assert rows[: len(before)] == before, "an epoch that was checkpointed was trained again"
    assert [world for world, _ in itertools.groupby(row["world"] for row in rows)][-3:] == [2, 1, 2]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best"]["val_loss"] == min(row["val_loss"] for row in rows if row["phase"] == "joint")
    assert load_public(folder / "bundle").image_size == (16, 16)


def table_flags(storage: Path) -> list[str]:
    flags = ["--presets", "quickstart", "--methods", "plain", "etc", "--seeds", "0", "--name", "table"]
    pairs = zip(*[iter(tiny_flags(storage))] * 2, strict=True)
    settings = [word for pair in pairs if pair[0] not in ("--cluster.storage", "--train.alpha") for word in pair]
    return [*flags, "--storage", str(storage), *settings]


def test_attacks_and_a_table_outlive_a_node(nodes: Nodes, trained: Trained, tmp_path: Path) -> None:
    epochs = 24
    inverse = {"width": 4, "depth": 2, "train": {"epochs": epochs, "batch_size": 10}}
    suite = {"num_queries": 20, "curve": False, "reference_epochs": 0}
    suite["attacks"] = {"feature_reconstruction": {}, "inverse": inverse, "known_gallery": {}}
    file = tmp_path / "suite.yaml"
    file.write_text(json.dumps(suite))
    bundle = shutil.copytree(trained.bundle, tmp_path / "bundle")  # the attack writes its verdict into it
    arguments = [str(bundle), "--suite", str(file), "--name", "a", "--storage", str(tmp_path)]
    process = nodes.job("attack", *arguments)
    table = nodes.job("table1", *table_flags(tmp_path))
    trains = tmp_path / "a" / "attacks" / "inverse"
    wait_until(lambda: len(rows_of(trains)) >= 2, process)
    lost = next(number for number in (2, 3) if nodes.holds(number, "ray::_call"))
    rows_before = rows_of(trains)[:-1]
    nodes.kill(lost)
    nodes.done(process)
    rows = rows_of(trains)
    assert [row["epoch"] for row in rows] == [n + 1 for n in range(epochs)]
    assert rows[: len(rows_before)] == rows_before
    card = json.loads((tmp_path / "a" / "scorecard.json").read_text())
    assert {result["status"] for result in card["attacks"].values()} == {"done"}
    assert card["attacks"]["known_gallery"]["reidentification_rate"] == 1
    undisturbed = attack_run.run_attack_suite(
        attack_plan.make_attack_plan(bundle=str(bundle), suite=str(file), name="undisturbed", storage=tmp_path),
        quiet=True,
    )
    for name, result in undisturbed["attacks"].items():
        scores = card["attacks"][name]["scores"]
        assert scores["ssim"]["mean"] == pytest.approx(result["scores"]["ssim"]["mean"], abs=0.02), name
    loss = rows_of(tmp_path / "undisturbed" / "attacks" / "inverse")[-1]["train_loss"]
    assert rows[-1]["train_loss"] == pytest.approx(loss, rel=0.05)
    nodes.done(table)
    assert "EtC" in (tmp_path / "table" / "table1.md").read_text()
    assert len(list((tmp_path / "table").glob("**/summary.json"))) == 2
    nodes.done(nodes.job("report", str(tmp_path / "a"), "--output", str(tmp_path / "report")))
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


def test_a_job_without_a_place_for_its_results_says_so(two_nodes: Nodes, tmp_path: Path) -> None:
    flags = [flag for flag in train_flags(tmp_path, "lost", 1) if flag not in ("--cluster.storage", str(tmp_path))]
    out, err = two_nodes.job("train", *flags).communicate(timeout=200)
    assert "Ray deletes this working directory of the job; set an absolute path" in " ".join((out + err).split())


def test_what_is_deployed_answers(two_nodes: Nodes, trained: Trained, tmp_path: Path) -> None:
    """A job deploys a model repository and ends; ``serve deploy`` of the shipped file replaces it, with tokens."""
    port = free_port()
    with publishing(trained.bundle, tmp_path / "models") as published:
        pass
    output = two_nodes.done(two_nodes.job("serve", str(tmp_path / "models"), "--port", str(port)))
    assert f"http://127.0.0.1:{port}/classifier/docs" in output
    url = f"http://127.0.0.1:{port}/classifier/v1"
    assert httpx.get(f"{url}/model", timeout=30).json()["version"] == published.version

    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    tokens = f"file://{tmp_path}/tokens.json"
    token = add_token(tokens, "test", ["classify", "attack"])
    config["http_options"]["port"] = port
    config["applications"] = config["applications"][:1]
    config["applications"][0]["args"] |= {"bundle": str(trained.run), "tokens": tokens}
    file = tmp_path / "serve_config.yaml"
    file.write_text(yaml.safe_dump(config))
    subprocess.run(["serve", "deploy", str(file)], env=two_nodes.client, check=True, capture_output=True, timeout=120)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/x-npy"}

    def answers() -> bool:
        """Whether the replica with tokens answers, in place of the one without."""
        try:
            return [
                httpx.get(f"{url}/model", headers=header, timeout=5, verify=False).status_code
                for header in (headers, {})
            ] == [200, 401]
        except httpx.HTTPError:
            return False

    wait_until(answers, two_nodes.running[1], 120)
    private = load_private(trained.bundle)
    body = io.BytesIO()
    np.save(body, private.sample.permute(0, 2, 3, 1).numpy())
    answer = httpx.post(f"{url}/classify", content=body.getvalue(), headers=headers, timeout=30)
    assert [image["index"] for image in answer.json()["images"]] == private.sample_classes.tolist()
    assert httpx.get(f"{url}/model", headers=headers, timeout=5).json()["bundle"] == f"{trained.run.name}/bundle"
    subprocess.run(["serve", "shutdown", "-y"], env=two_nodes.client, check=True, capture_output=True, timeout=120)
