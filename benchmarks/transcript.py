"""Record docs/results/cluster-transcript.md: from training to an endpoint on a cluster of three nodes.

    python benchmarks/transcript.py

It trains, publishes, serves, trains again while a node is drained, follows the live swap, and kills the head, all by
`ray job submit` and `serve deploy`. Each node is a network namespace of this machine, so it needs root and the program
`ip`; the part with the killed head needs `redis-server`. It takes 5 to 8 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from _recording import CPUS, PAGE, ROOT, SETTINGS, SHARED, Nodes, Page, Session, wait_for

from raypp.client.http import Client
from raypp.client.session import RemoteError
from raypp.experiments.run_folder import cpu_name

SMALL = {
    "data": {"image_size": [16, 16], "num_val": 100, "source": {"num_train": 1600, "num_test": 300}},
    "protection": {"width": 4, "depth": 2},
    "train": {"optimizer": {"name": "muon", "lr": 0.02}},
    # Ray Train counts a replica's CPU as free. With one CPU for a worker it would start two on the node that is left.
    "cluster": {"num_workers": 2, "min_workers": 1, "cpus_per_worker": 2, "max_failures": -1, "resize_seconds": 5},
}
JOB = "ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python"
URL = "http://127.0.0.1:8000"  # on each node; clients send tokens over HTTPS or to their own machine only


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
        f"The head runs no tasks. Each other node has {CPUS} CPUs by Ray's count; all three share the same cores. "
        + ("The head keeps its state in Redis (`RAY_REDIS_ADDRESS`), which runs outside the cluster." if redis else "")
    )
    page.prose("Every `ray start` also has these settings, which the commands leave out:")
    page.table(("setting", "reason"), {f"`{setting}`": reason for setting, reason in SETTINGS.items()})
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
    return seconds, sorted(seen - known)


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
