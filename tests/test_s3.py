"""Runs, data and bundles on an S3-compatible server that is started here (moto's, in a process of its own)."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Cluster, free_port, listens, start_cluster, tiny_flags, wait_until

from raypp.bundle.load import load_private, load_public
from raypp.config.presets import load_config
from raypp.evaluation.report.render import write_report
from raypp.experiments.attack_plan import make_attack_plan
from raypp.experiments.attack_run import run_attack_suite
from raypp.experiments.training_run import open_run, train_locally
from raypp.serve.auth import TokenObject, add_token, open_tokens, remove_token
from raypp.serve.model_store import ModelManager
from raypp.serve.publication import publish
from raypp.training import checkpoint
from raypp.training.checkpoint import list_checkpoints
from raypp.utils.errors import RayppError, StorageError
from raypp.utils.images import encode_png
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's log, a line for each request."""
    return tmp_path_factory.mktemp("s3") / "requests"


@pytest.fixture(scope="module")
def s3(requests: Path) -> Iterator[Any]:
    """Makes URIs in a bucket of a server on loopback: ``s3("runs")``."""
    port = free_port()
    arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with requests.open("wb") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", secrets.token_hex(8))
        patch.setenv("AWS_SECRET_ACCESS_KEY", secrets.token_hex(16))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        try:
            wait_until(lambda: listens(port), process, 60)
            httpx.put(f"http://127.0.0.1:{port}/bucket").raise_for_status()
            yield lambda name: f"s3://bucket/{name}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_folder_behaves_as_a_local_one(s3: Any, tmp_path: Path) -> None:
    storage = Storage(s3("folder"))
    assert not storage.exists("a/b.txt")
    assert storage.names() == []
    storage.write("a/b.txt", b"one")
    storage.write("a/b.txt", b"two")
    assert storage.read("a/b.txt") == b"two"
    (tmp_path / "x" / "deep").mkdir(parents=True)
    (tmp_path / "x" / "deep" / "f").write_bytes(b"three")
    (tmp_path / "x" / "last").write_bytes(b"four")
    storage.folder("c").upload(tmp_path / "x", "x", last="last")
    assert storage.folders() == ["a", "c"]
    with storage.folder("c").download("x") as here:
        assert (here / "deep" / "f").read_bytes() == b"three"
    (tmp_path / "x" / "deep" / "f").rename(tmp_path / "x" / "g")
    storage.folder("c").upload(tmp_path / "x", "x", last="last")
    with storage.folder("c").download("x") as here:
        assert sorted(path.name for path in here.rglob("*") if path.is_file()) == ["g", "last"]
    storage.delete("c")
    assert storage.folders() == ["a"]
    storage.remove("a/b.txt")
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/folder.*b\.txt"):
        storage.read("a/b.txt")


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_sentence(s3: Any) -> None:
    with pytest.raises(StorageError, match=r"^cannot write s3://another/runs/x") as caught:
        Storage(s3("runs").replace("bucket", "another")).write("x", b"")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_its_data_and_its_bundle_live_there(s3: Any, tmp_path: Path) -> None:
    """Trained, taken up past a damaged checkpoint, attacked, reported and published without a local copy."""
    random = np.random.default_rng(0)
    for split, num in (("train", 80), ("test", 20)):
        labels = random.integers(0, 3, num)
        pictures = random.integers(0, 80, (num, 16, 16, 3), dtype=np.uint8)
        pictures[np.arange(num), :, :, labels] += 120
        rows = {"img": [{"bytes": encode_png(p), "path": None} for p in pictures], "label": labels}
        pq.write_table(pa.table(rows), tmp_path / f"{split}-0.parquet")
        Storage(s3("data")).write(f"{split}-0.parquet", (tmp_path / f"{split}-0.parquet").read_bytes())

    def flags(epochs: int) -> list[str]:
        settings = tiny_flags(tmp_path, train__epochs=epochs, data__num_test="null")
        kept = [
            pair
            for pair in zip(settings[::2], settings[1::2], strict=True)
            if not pair[0].startswith(("--data.source", "--cluster.storage"))
        ]
        kept += [("--data.source.name", "parquet"), ("--data.source.path", s3("data"))]
        kept += [("--cluster.storage", s3("runs"))]
        return [word for pair in kept for word in pair]

    run_folder = Storage(s3("runs")).folder("one")
    with open_run(load_config("quickstart", flags=flags(2)), "one") as run:
        train_locally(run, ProgressDisplay(quiet=True), torch.device("cpu"))
    assert list_checkpoints(run_folder) == ["epoch_0003", "epoch_0002"]

    state = f"checkpoints/{list_checkpoints(run_folder)[0]}/state.pt"
    run_folder.write(state, run_folder.read(state)[:-50])  # as an upload that broke off would leave it
    with open_run(load_config("quickstart", flags=flags(3)), "one", resume=True) as run:
        train_locally(run, ProgressDisplay(quiet=True), torch.device("cpu"))
    rows = [json.loads(line) for line in run_folder.read("metrics.jsonl").splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [("plain", 1), ("joint", 1), ("joint", 2), ("joint", 3)]

    bundle = run_folder.folder("bundle").uri
    assert load_public(bundle.replace("/bundle?", "/bundle/public?")).image_size == (16, 16)
    load_private(bundle)

    suite = ["--num_queries", "10", "--reference_epochs", "0", "--curve", "false"]
    plan = make_attack_plan(
        bundle=bundle, suite="quick", attacks=["feature_reconstruction"], flags=suite, storage=s3("runs"), name="a"
    )
    card = run_attack_suite(plan, resume=False, quiet=True)
    assert card["attacks"]["feature_reconstruction"]["status"] == "done"
    write_report([plan.storage.uri], Storage(s3("report")))
    assert b"<html" in Storage(s3("report")).read("report.html")[:500]
    with open_run(load_config("quickstart", flags=flags(3)), "two"), pytest.raises(RayppError, match="exists already"):
        open_run(load_config("quickstart", flags=flags(3)), "one").__enter__()
    publish(run_folder.uri, s3("models"))
    publish(s3("models"), s3("promoted"))  # the active bundle of another repository
    assert ModelManager(s3("promoted")).active.protection == ModelManager(run_folder.uri).active.protection


@pytest.mark.slow
def test_tokens_live_there(s3: Any) -> None:
    """A service reads them again; what it has stays valid while the storage is away."""
    uri = s3("secret/tokens.json")
    first = add_token(uri, "first", ["classify"])
    tokens = open_tokens(uri)
    assert isinstance(tokens, TokenObject)
    assert tokens.current().check(f"Bearer {first}", "classify") == "first"
    second = add_token(uri, "second", ["classify"])
    remove_token(uri, "first")
    tokens.refresh()
    assert [name for name, _, _ in tokens.current().entries] == ["second"]
    Storage(uri).remove("")
    tokens.refresh()
    assert tokens.current().check(f"Bearer {second}", "classify") == "second"
    with pytest.raises(RayppError, match=r"^token file 's3://.*tokens\.json.*' cannot be read: cannot read s3://"):
        open_tokens(uri)


@pytest.fixture(scope="module")
def cluster_with_keys(s3: Any, zygote: Path) -> Iterator[Cluster]:  # `s3` sets its keys
    with start_cluster(zygote) as cluster:
        yield cluster


class SlowUpload(BaseHTTPRequestHandler):
    """Forwards to the server: the first upload of a checkpoint is refused once, and then waits until it may end."""

    protocol_version = "HTTP/1.1"
    server_url: ClassVar[str]
    may_end = threading.Event()
    refused: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.forward()

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815

    def forward(self) -> None:
        body = self.body()
        is_upload = self.command == "PUT" and "epoch_0001/state.pt" in self.path
        if is_upload and not self.refused:
            self.refused.append(self.path)
            self.answer(503, {}, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")
            return
        if is_upload:
            assert self.may_end.wait(60), "training waits for the upload"
        hop = ("connection", "expect", "content-length", "transfer-encoding")
        headers = {key: value for key, value in self.headers.items() if key.lower() not in hop}
        answer = httpx.request(self.command, self.server_url + self.path, headers=headers, content=body)
        self.answer(answer.status_code, dict(answer.headers), answer.content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        own = ("content-length", "connection", "date", "server", "transfer-encoding")
        for key, value in headers.items():
            if key.lower() not in own:
                self.send_header(key, value)
        self.send_header(
            "Content-Length", headers.get("content-length", "0") if self.command == "HEAD" else str(len(body))
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.ray
def test_workers_of_ray_keep_their_checkpoints_there(s3: Any, cluster_with_keys: Cluster, tmp_path: Path) -> None:
    """They train during an upload; one that the server refuses once costs no restart."""
    from ray.train import Result

    (direct,) = re.findall(r"127\.0\.0\.1:\d+", s3("ray"))
    SlowUpload.server_url = f"http://{direct}"
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowUpload) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        uri = s3("ray").replace(direct, f"127.0.0.1:{proxy.server_port}")
        flags = [word if word != str(tmp_path) else uri for word in tiny_flags(tmp_path, train__epochs=3)]
        flags += ["--cluster.num_workers", "1", "--cluster.max_failures", "0", "--publish", s3("ray-models")]
        process = cluster_with_keys.popen(["raypp", "train", "quickstart", "--name", "ray", *flags])
        wait_until(lambda: SlowUpload.refused, process)
        wait_until(lambda: re.search(r"plain epoch +1/1", process.output()[1]), process)
        SlowUpload.may_end.set()
        out, err = process.communicate(timeout=300)
        proxy.shutdown()
    assert process.returncode == 0, out + err
    version = ModelManager(s3("ray-models")).active.version
    assert f"{version} is active\n" in err
    folder = Storage(s3("ray")).folder("ray")
    assert list_checkpoints(folder)[:2] == ["epoch_0004", "epoch_0003"]
    result = Result.from_path(folder.uri)
    assert sorted(Path(part.path).name for part, _ in result.best_checkpoints) == sorted(list_checkpoints(folder))
    for part, metrics in result.best_checkpoints:
        with part.as_directory() as path:
            assert len(checkpoint.load(Path(path))[1]) == metrics["epochs_done"]
    rows = [json.loads(line) for line in folder.read("metrics.jsonl").splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [("plain", 1), ("joint", 1), ("joint", 2), ("joint", 3)]
    load_private(folder.folder("bundle").uri)


@pytest.mark.ray
def test_a_search_lives_there(s3: Any, requests: Path, cluster_with_keys: Cluster, tmp_path: Path) -> None:
    """Trials, Tune's own state and the bundles that are handed over; and it is finished when asked again.

    Ray's period of at least 10 s bounds how often the state of all trials is written.
    """
    settings = [
        word for word in tiny_flags(tmp_path, train__epochs=1) if word not in ("--cluster.storage", str(tmp_path))
    ]
    command = ["raypp", "tune", "quickstart", "--storage", s3("searches")]
    flags = ["--name", "search", "--search.num_trials", "2", "--search.scheduler", "none", "--search.suite", "null"]
    flags += ["--search.attack", "{width: 4, train: {epochs: 1}}", "--search.space.protection.skips", "[0, 1, 2]"]
    began = time.monotonic()
    for more in ([], ["--resume", "--publish", s3("best-models")]):
        done = cluster_with_keys.run([*command, *flags, *settings, *more])
        assert done.returncode == 0, done.stdout + done.stderr
    snapshots = re.findall(r'"PUT /bucket/\S*/experiment_state-\S*json', requests.read_text())
    assert 1 <= len(snapshots) <= (time.monotonic() - began) / 10 + 3
    folder = Storage(s3("searches")).folder("search")
    assert len(folder.read("trials.csv").decode().splitlines()) == 3
    assert folder.exists("front.png")
    for best in (handed_over := folder.folder("best").folders()):
        load_private(folder.folder(f"best/{best}").uri)
    assert handed_over
    best = ModelManager(s3("best-models")).active.version
    assert ModelManager(f"{folder.uri}#knee").active.version == ModelManager(folder.uri).active.version == best
