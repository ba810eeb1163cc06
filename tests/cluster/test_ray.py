"""Training and attacks on a real Ray: workers and drivers that die, damaged checkpoints, streams."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Cluster, Trained, override, wait_until
from event_files import scalars

from raypp.bundle.load import load_public
from raypp.cli.main import main
from raypp.data import SOURCES
from raypp.experiments.run_folder import MUTABLE_ON_RESUME
from raypp.training import checkpoint
from raypp.training.checkpoint import NUM_KEPT, RAY_SNAPSHOT, list_checkpoints
from raypp.utils import runtime
from raypp.utils.images import encode_png
from raypp.utils.storage import Storage

pytestmark = pytest.mark.ray

TINY = [
    "--data.source.num_train", "400", "--data.source.num_test", "100", "--data.num_val", "80",
    "--data.image_size", "[16, 16]",
    "--protection.width", "4", "--protection.depth", "2", "--train.batch_size", "32",
    "--train.plain_epochs", "1", "--train.precision", "fp32",
]  # fmt: skip


def command(tmp_path: Path, name: str, *flags: str, epochs: int = 2, preset: str = "quickstart") -> list[str]:
    storage = ["--cluster.storage", str(tmp_path), "--train.epochs", str(epochs)]
    return ["raypp", "train", preset, "--name", name, *override([*TINY, *storage], flags)]


def history(run_folder: Path) -> list[dict[str, Any]]:
    path = run_folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def epochs_of(run_folder: Path) -> list[tuple[str, int]]:
    return [(row["phase"], row["epoch"]) for row in history(run_folder)]


def expected(epochs: int) -> list[tuple[str, int]]:
    return [("plain", 1), *(("joint", n + 1) for n in range(epochs))]


def test_a_worker_killed_within_an_epoch_costs_what_came_after_the_newest_checkpoint(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = Storage(tmp_path / "killed")
    flags = ("--cluster.num_workers", "2", "--data.source.num_train", "1400", "--train.checkpoint_seconds", "0.2")
    process = cluster.popen([*command(tmp_path, "killed", *flags, epochs=3), "--verbose", "--track", "tensorboard"])

    def within_an_epoch() -> bool:
        return len(history(tmp_path / "killed")) >= 2 and "_part_" in list_checkpoints(run)[0]

    wait_until(within_an_epoch, process)
    victims = cluster.training_workers()
    assert len(victims) == 2
    victims[-1].kill()
    there, written = set(list_checkpoints(run)), set()
    while process.poll() is None:
        written |= set(list_checkpoints(run)) - there
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert err.count("Attempting to start training worker group of size 2") == 2, "Ray's own lines, with --verbose"
    # No step before that checkpoint was taken again. Names sort as what they stand for.
    assert min(written) > max(there)
    rows = history(tmp_path / "killed")
    assert epochs_of(tmp_path / "killed") == expected(3)
    assert scalars(tmp_path / "killed" / "tensorboard")["joint/val_accuracy"] == [2, 3, 4]
    assert {row["world"] for row in rows} == {2}
    assert load_public(tmp_path / "killed" / "bundle").image_size == (16, 16)
    check_result(tmp_path / "killed")


def listed(folder: Path) -> set[str]:
    """Names of the checkpoints in Ray's own list."""
    from ray.train import Result

    return {Path(part.path).name for part, _ in Result.from_path(str(folder)).best_checkpoints}


def check_result(folder: Path) -> None:
    """Ray's own list of a run's checkpoints: all in its folder, which load, the best of the last phase among them."""
    from ray.train import Result

    result = Result.from_path(str(folder))
    names = [Path(part.path).name for part, _ in result.best_checkpoints]
    present = list_checkpoints(Storage(folder))
    assert sorted(names) == sorted(present)
    assert len(present) <= NUM_KEPT + 1
    assert Path(result.checkpoint.path).name == present[0]
    for part, metrics in result.best_checkpoints:
        with part.as_directory() as path:
            _, rows = checkpoint.load(Path(path))
        assert len(rows) == int(metrics["epochs_done"])
        if metrics["epochs_done"] == len(rows):
            # An epoch that was trained again, after damage, has other times in its second checkpoint.
            row = {key: value for key, value in rows[-1].items() if key not in ("seconds", "images_per_s")}
            assert {key: metrics[key] for key in row} == pytest.approx(row, rel=1e-3)
    best = result.get_best_checkpoint("score", "max")
    assert best is not None
    number = max(n for n, row in enumerate(history(folder), 1) if row["best"])
    assert Path(best.path).name == f"epoch_{number:04d}"


def test_a_killed_driver_is_resumed_past_a_damaged_checkpoint(
    cluster: Cluster, processes: ForkServerContext, tmp_path: Path
) -> None:
    folder = tmp_path / "orphan"
    flags = ("--cluster.num_workers", "1", "--train.adapt_threads", "false")
    arguments = command(tmp_path, "orphan", *flags, epochs=4)
    process = cluster.popen(arguments)
    wait_until(lambda: len(history(folder)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    wait_until_gone(cluster)

    refused = cluster.run(arguments)
    assert refused.returncode == 2
    assert "exists already" in refused.stderr

    before = {(row["phase"], row["epoch"]): row["train_loss"] for row in history(folder)}
    newest = list_checkpoints(Storage(folder))[0]
    state = folder / "checkpoints" / newest / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    resumed = cluster.run([*arguments, "--resume"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"checkpoint {newest} is damaged" in " ".join(resumed.stderr.split())
    assert epochs_of(folder) == expected(4)
    after = {(row["phase"], row["epoch"]): row["train_loss"] for row in history(folder)}
    # Earlier epochs stay as they were; only the epoch of the damaged checkpoint was trained again.
    unchanged = list(before)[: int(newest.removeprefix("epoch_")) - 1]
    assert unchanged
    assert [after[key] for key in unchanged] == [before[key] for key in unchanged]

    check_result(folder)

    again = cluster.run([*arguments, "--resume"])
    assert again.returncode == 0
    assert "is finished: nothing left to train" in " ".join(again.stderr.split())
    assert epochs_of(folder) == expected(4)

    main([*command(tmp_path, "whole", *flags, epochs=4)[1:], "--local"])
    assert learned(folder) == learned(tmp_path / "whole"), "the result differs from that of an undisturbed run"

    # Without Ray, which then learns of the checkpoint from which it continues, and forgets those that are gone.
    main([*command(tmp_path, "orphan", *flags, epochs=6)[1:], "--local", "--resume"])
    assert not (folder / RAY_SNAPSHOT).exists()
    assert list_checkpoints(Storage(folder)) == ["epoch_0007", "epoch_0006"]
    (folder / RAY_SNAPSHOT).write_text('{"checkpoint_results": [')  # as a driver that died within it leaves it
    longer = cluster.run([*command(tmp_path, "orphan", *flags, epochs=7), "--resume"])
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert epochs_of(folder) == expected(7)
    assert list_checkpoints(Storage(folder)) == ["epoch_0008", "epoch_0007"]
    assert listed(folder) == {"epoch_0008", "epoch_0007"}

    # In a process group of two, as torchrun starts one.
    settings = command(tmp_path, "orphan", epochs=8)[5:]
    members = [processes.Process(target=train_in_group, args=(rank, folder, settings)) for rank in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join(120)
    assert [member.exitcode for member in members] == [0, 0]
    assert epochs_of(folder) == expected(8)
    assert [row["world"] for row in history(folder)] == [1] * 8 + [2]


def train_in_group(rank: int, folder: Path, flags: list[str]) -> None:
    """Continue a run as one of two processes."""
    import torch
    import torch.distributed as dist

    from raypp.config.presets import load_config
    from raypp.training.protection_task import fit
    from raypp.training.reporter import Reporter
    from raypp.utils.progress import ProgressListener

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    fit(load_config("quickstart", flags=flags), Reporter(Storage(folder), ProgressListener(), torch.device("cpu")))
    dist.destroy_process_group()


def learned(run_folder: Path) -> list[dict[str, Any]]:
    """The history without speeds."""
    return [{k: v for k, v in row.items() if k not in {"seconds", "images_per_s"}} for row in history(run_folder)]


def exported_metrics(cluster: Cluster, run: str) -> dict[str, float]:
    """A run's gauges at the node's metrics endpoint."""
    text = httpx.get(f"http://127.0.0.1:{cluster.metrics_port}/metrics", timeout=30).text
    lines = [line for line in text.splitlines() if line.startswith("ray_raypp_train_") and f'run="{run}"' in line]
    return {line.removeprefix("ray_raypp_train_").partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_stopped_run_names_its_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    process = cluster.popen(command(tmp_path, "stopped", "--cluster.num_workers", "1", epochs=500))
    wait_until(lambda: len(history(tmp_path / "stopped")) >= 2, process)
    metrics = wait_until(lambda: exported_metrics(cluster, "stopped"), process)
    assert metrics.keys() == {"loss", "images_per_second", "epoch"}
    assert metrics["epoch"] in range(1, history(tmp_path / "stopped")[-1]["epoch"] + 2)
    assert metrics["images_per_second"] > 0
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    newest = list_checkpoints(Storage(tmp_path / "stopped"))[0]
    assert f"stopped after checkpoint {newest}; continue with --resume: raypp train " in " ".join(err.split())
    assert "SIGTERM" not in err
    rows = history(tmp_path / "stopped")
    assert epochs_of(tmp_path / "stopped") == expected(len(rows) - 1)
    wait_until_gone(cluster)


def wait_until_gone(cluster: Cluster) -> None:
    """Ray ends the workers of a dead driver; a resumed run must not meet them."""
    end = time.monotonic() + 60
    while cluster.training_workers():
        assert time.monotonic() < end, "workers outlive their driver"
        time.sleep(0.2)


def test_ray_watches_nodes_except_of_a_cluster_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """raypp starts such a Ray itself; the user's own setting has priority."""
    from raypp.cluster.session import WATCHER, _without_watcher
    from raypp.cluster.train_reporter import watches_preemption

    assert WATCHER not in runtime.SETTINGS
    monkeypatch.delenv(WATCHER, raising=False)
    assert watches_preemption()
    with _without_watcher():
        assert not watches_preemption()
    assert watches_preemption()
    monkeypatch.setenv(WATCHER, "1")
    with _without_watcher():
        assert watches_preemption()


def test_each_notice_requests_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import train

    from raypp.cluster.train_reporter import TrainWorkerProgress

    def notice(*nodes: str) -> train.PreemptionInfo:
        return train.PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={node: [0] for node in nodes})

    answers = iter([None, notice("a"), notice("a"), notice("a", "b"), notice("b"), None])
    monkeypatch.setattr(train, "get_preemption_info", lambda: next(answers))
    monkeypatch.setattr(train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    progress = TrainWorkerProgress(None, watch=True)
    assert [progress.should_save() for _ in range(6)] == [False, True, False, True, False, False]
    assert not TrainWorkerProgress(None, watch=False).should_save()


def test_divergence_stops_at_once_and_says_where(cluster: Cluster, tmp_path: Path) -> None:
    result = cluster.run(command(tmp_path, "nan", "--train.optimizer.lr", "1e12", "--cluster.num_workers", "1"))
    assert result.returncode == 1
    message = " ".join(result.stderr.split())
    assert "the loss is not a finite number at step" in message
    assert "learning rate" in message
    assert "last good checkpoint" in message
    assert "Traceback" not in message


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Two training files and a test file of pictures whose class is their colour."""
    folder = tmp_path / "set"
    folder.mkdir()
    random = np.random.default_rng(0)
    for file, num in (("train-0", 300), ("train-1", 300), ("test-0", 60)):
        labels = random.integers(0, 3, num)
        pictures = random.integers(0, 80, (num, 32, 32, 3), dtype=np.uint8)
        pictures[np.arange(num), :, :, labels] += 120
        rows = {"img": [{"bytes": encode_png(p), "path": None} for p in pictures], "label": labels}
        pq.write_table(pa.table(rows), folder / f"{file}.parquet", row_group_size=50)
    return folder


STREAM = [
    "--train.mode", "plain", "--protection", "plain", "--data.stream", "true", "--data.image_size", "[32, 32]",
    "--data.num_val", "80", "--data.shuffle_buffer", "200", "--train.batch_size", "32", "--train.epochs", "3",
    "--cluster.num_workers", "1",
]  # fmt: skip


def stream_command(tmp_path: Path, name: str, folder: Path) -> list[str]:
    source = ["--data.source.name", "parquet", "--data.source.path", str(folder)]
    return ["raypp", "train", "quickstart", "--name", name, "--cluster.storage", str(tmp_path), *source, *STREAM]


def test_a_stream_trains_as_well_as_memory(cluster: Cluster, tmp_path: Path, parquet: Path) -> None:
    result = cluster.run(stream_command(tmp_path, "stream", parquet))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "training worker group" not in result.stderr, "Ray's own lines, without --verbose"
    summary = json.loads((tmp_path / "stream" / "summary.json").read_text())
    assert summary["num_train"] + summary["num_val"] == 600
    assert 40 <= summary["num_val"] <= 120  # each image is drawn with probability 80 / 600
    assert summary["test"]["num_images"] == 60
    assert summary["test"]["accuracy"] > 0.9
    assert (tmp_path / "stream" / "validation" / "validation.json").exists()


STREAM_IN_FULL = """
import json, os, sys
from pathlib import Path
import ray.train, torch
from raypp.cluster.session import ray_session
from raypp.config.presets import load_config
from raypp.data.streaming import StreamLoader, build_execution_options, open_stream, validation_set
from raypp.utils.storage import Storage

def configure(name, folder, *more):
    flags = ["--data.stream", "true", "--data.image_size", "[8, 8]", "--data.source.name", name]
    return load_config("quickstart", flags=[*flags, "--data.source.path", folder, *more])

sets, run = json.loads(sys.argv[1]), Storage(sys.argv[2])
with ray_session():
    for name, folder in sets:
        config = configure(name, folder, "--data.num_val", "1")
        stream = open_stream(config)
        for part in (stream.train, stream.val) * 2:
            part.context.execution_options = build_execution_options(config, 1)
            print("ROWS", json.dumps([[int(row["label"]), row["image"].tolist()] for row in part.iter_rows()]))

    num_read = []
    settings = ["--data.num_val", "4", "--data.shuffle_buffer", "5", "--train.batch_size", "2"]
    config = configure(*sets[0], *settings)
    options = build_execution_options(config, 1)

    def select(config):
        val = validation_set(open_stream(config), run, options, lambda: num_read.append(1))
        print("VAL", len(num_read), json.dumps([val["label"].tolist(), val["image"].tolist()]))
        return val

    val = select(config)
    select(config)
    (run.path / "validation" / "images.safetensors").write_bytes(b"damaged")
    select(config)
    file = next(Path(sets[0][1]).glob("train-0.parquet"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # as after a change
    select(config)
    select(config)
    select(configure(*sets[0], *settings, "--seed", "1"))

    train = open_stream(config).train
    train.context.execution_options = options
    ray.train.get_dataset_shard = lambda _: train.iterator()
    loader = StreamLoader(config, val, torch.device("cpu"), 0, 1)
    for epoch, first in ((0, 0), (0, 0), (0, 2), (1, 0)):
        print("EPOCH", json.dumps([[i.tolist(), l.tolist()] for i, l in loader.epoch(epoch, first)]))
"""


def test_a_stream_gives_what_memory_reads(cluster: Cluster, tmp_path: Path) -> None:
    """Files of different storage, labels in folder names, files without rows, names that are no UTF-8; in one order."""
    random = np.random.default_rng(0)

    def write(path: Path, labels: pa.Array | None, kind: pa.DataType | None = None, num: int = 6) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pngs = [encode_png(image) for image in random.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)]
        columns = {"img": pa.array(pngs, kind)} | ({} if labels is None else {"label": labels})
        pq.write_table(pa.table(columns), path, row_group_size=4 if kind is None else 10)

    words = pa.array(["a", "b", "c"] * 2)
    for split in ("train", "test"):
        write(tmp_path / f"mixed/{split}-0.parquet", words)
        write(tmp_path / f"mixed/{split}-1.parquet", words.dictionary_encode())
        write(tmp_path / f"mixed/{split}-2.parquet", words.cast(pa.string_view()), pa.binary_view())
        write(tmp_path / f"mixed/{split}-3.parquet", pa.array([], pa.null()), pa.null(), num=0)
        for label in ("0", "1"):
            write(tmp_path / f"column/{split}/label={label}/x.parquet", pa.array([0, 1, 2] * 2))
            write(tmp_path / f"folders/{split}/label={label}/x.parquet", None)
            folder = tmp_path / "files" / split / label / os.fsdecode(b"caf\xe9")
            folder.mkdir(parents=True)
            for i in range(4):
                (folder / f"{i}").write_bytes(encode_png(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)))
    sets = [("parquet", str(tmp_path / name)) for name in ("mixed", "column", "folders")]
    sets.append(("folder", str(tmp_path / "files")))
    result = subprocess.run(
        [sys.executable, "-c", STREAM_IN_FULL, json.dumps(sets), str(tmp_path / "run")],
        env=cluster.client, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split(" ", 1) for line in result.stdout.splitlines()]
    streams = [json.loads(text) for kind, text in lines if kind == "ROWS"]
    for i, (name, path) in enumerate(sets):
        source = SOURCES.build(SOURCES.options(name)(name=name, path=path), size=(8, 8), channels=3)
        memory = source.load("train")
        train, val, *again = streams[4 * i : 4 * i + 4]
        assert [train, val] == again, "another order the second time"
        expected = [[int(label), image.tolist()] for label, image in zip(memory.labels, memory.images, strict=True)]
        assert sorted(train + val) == sorted(expected), path
    check_validation_sets([text.split(" ", 1) for kind, text in lines if kind == "VAL"])
    whole, again, resumed, other = (json.loads(text) for kind, text in lines if kind == "EPOCH")
    assert whole == again
    assert whole[2:] == resumed, "a resumed epoch trains on other images than the rest of the epoch"
    assert len(resumed) >= 2
    assert whole != other, "all epochs have one order"


def check_validation_sets(selections: list[list[str]]) -> None:
    """The whole set is read at the first start, and where the stored images are damaged or of other data."""
    assert [int(num_read) for num_read, _ in selections] == [1, 1, 2, 3, 3, 4]
    first, *same, other = (text for _, text in selections)
    assert set(same) == {first}
    assert other != first


def test_a_damaged_image_in_a_stream_is_named(cluster: Cluster, tmp_path: Path, parquet: Path) -> None:
    table = pq.read_table(parquet / "train-1.parquet").to_pylist()
    table[17]["img"]["bytes"] = table[17]["img"]["bytes"][:60]
    pq.write_table(pa.Table.from_pylist(table), parquet / "train-1.parquet")
    result = cluster.run([*stream_command(tmp_path, "damaged", parquet), "--cluster.max_failures", "0"])
    assert result.returncode == 2
    message = " ".join(result.stderr.split())
    assert "train-1.parquet" in message
    assert "row 17 is a damaged PNG image" in message
    assert "Traceback" not in message


def test_storage_that_becomes_unwritable_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    arguments = command(tmp_path, "full", "--cluster.num_workers", "1", "--data.source.num_train", "800", epochs=4)
    arguments += ["--cluster.max_failures", "0"]
    process = cluster.popen(arguments)
    wait_until(lambda: len(history(folder)) >= 2, process)
    # Root may write anywhere, so the folder makes room for a file: every write below it fails.
    good = folder.with_name("good")
    folder.rename(good)
    folder.write_text("a file where the run's folder was")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    folder.unlink()
    good.rename(folder)
    epochs_before = len(history(folder))
    resumed = cluster.run([*arguments, "--resume"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert epochs_of(folder) == expected(4)
    assert epochs_before >= 2


def test_table1_outlives_a_killed_cell(cluster: Cluster, tmp_path: Path) -> None:
    table = tmp_path / "table"
    flags = override(TINY, ["--data.source.num_train", "1200", "--train.epochs", "4", "--cluster.max_failures", "1"])
    grid = ["--presets", "quickstart", "--methods", "plain", "tanaka", "--storage", str(tmp_path), "--name", "table"]
    process = cluster.popen(["raypp", "table1", *grid, *flags])
    victim_cell = table / "cells" / "quickstart-tanaka-seed0"
    wait_until(lambda: len(history(victim_cell)) >= 1, process)
    cluster.head.processes("ray::_call")[0].kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert epochs_of(victim_cell) == [("joint", n + 1) for n in range(4)]
    assert epochs_of(table / "cells" / "quickstart-plain-seed0") == [("plain", n + 1) for n in range(4)]
    rows = (table / "table1.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["plain", "tanaka"]
    assert all(row.split(",")[3] for row in rows[1:])
    assert (table / "table1.png").stat().st_size > 1000


def test_a_message_names_resources_only_if_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    from raypp.cluster import waiting

    total, free, reserved, messages = {"CPU": 4.0}, {"CPU": 0.5}, dict[str, float](), list[str]()
    monkeypatch.setattr(waiting.ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(waiting.ray, "available_resources", lambda: free)
    monkeypatch.setattr(waiting, "reserved_resources", lambda: reserved)

    def message(part: str, **required: float) -> str:
        notice = waiting.ResourceNotice(part, required, 1e-6, lambda: True, messages.append)
        while not messages:
            notice.check()
        return messages.pop()

    both = message("training on 2 workers", CPU=2, GPU=1)
    assert both == (
        "training on 2 workers waits for 2 CPUs and 1 GPU; the cluster has 4 CPUs (0.5 free) and 0 GPUs (0 free)"
    )
    total["CPU"], free["CPU"] = 1.0, 0.0
    assert message("an attack", CPU=1, GPU=0) == "an attack waits for 1 CPU; the cluster has 1 CPU (0 free)"
    starting = "an attack has not started after 0 s, although its resources are free or reserved"
    reserved["CPU"] = 1
    assert message("an attack", CPU=1, GPU=0) == starting
    free["CPU"] = 1.0  # for the tasks that read a stream
    assert message("an attack", CPU=2, GPU=0) == starting
    reserved.clear()
    assert message("an attack", CPU=1, GPU=0) == starting


def test_a_message_about_resources_repeats_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first after half of it; after an interruption it counts from zero."""
    from raypp.cluster import waiting

    clock, waits, said = [0.0], [True], []
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    for name in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(waiting.ray, name, dict)
    monkeypatch.setattr(waiting, "reserved_resources", dict)
    texts: list[str] = []

    def warn(text: str) -> None:
        said.append(clock[0])
        texts.append(text)

    notice = waiting.ResourceNotice("it", {}, 60, lambda: waits[0], warn)

    def look(until: float) -> None:
        while clock[0] < until:
            notice.check()
            clock[0] += 0.5

    look(200)
    assert said == [30, 90, 150]
    waits[0] = False
    look(210)
    waits[0] = True
    look(239)
    assert said == [30, 90, 150]
    look(250)
    assert said[3:] == [240]
    assert [text.split(" s,")[0] for text in texts] == [f"it has not started after {n}" for n in (30, 90, 150, 30)]


def test_parts_wait_while_none_of_them_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from raypp.cluster import waiting

    nodes = [{"NodeID": "one", "Alive": True}, {"NodeID": "two", "Alive": True}]
    monkeypatch.setattr(waiting.ray, "nodes", lambda: nodes)
    parts = waiting.SubmittedParts()
    assert not parts.all_wait()
    parts.submit("a")
    parts.submit("b")
    assert parts.all_wait()
    parts.start("b", "two")
    assert not parts.all_wait()
    nodes[1]["Alive"] = False  # Ray starts its task again when there is room
    assert parts.all_wait()
    parts.start("b", "one")
    assert not parts.all_wait()
    parts.end("b")
    assert parts.all_wait()
    parts.start("b", "one")  # a report that comes after the end
    assert parts.all_wait()
    parts.end("a")
    assert not parts.all_wait()


def test_what_may_differ_on_resume_is_in_the_configuration() -> None:
    from raypp.config.presets import load_config

    tree = load_config("cifar10").model_dump()  # whose features have all settings
    for key in MUTABLE_ON_RESUME:
        node: Any = tree
        for part in key.split("."):
            node = node[part]


EPOCHS = 16


def write_suite(folder: Path, epochs: int) -> Path:
    file = folder / "suite.yaml"
    inverse = {"width": 4, "depth": 2, "train": {"epochs": epochs, "batch_size": 10}}
    attacks = {"feature_reconstruction": {}, "inverse": inverse, "white_box": {"steps": 2, "num_images": 10}}
    file.write_text(json.dumps({"num_queries": 20, "curve": False, "reference_epochs": 0, "attacks": attacks}))
    return file


def attack_command(trained: Trained, folder: Path, epochs: int) -> list[str]:
    bundle = shutil.copytree(trained.bundle, folder / "bundle")
    where = ["--suite", str(write_suite(folder, epochs)), "--name", "a", "--storage", str(folder)]
    return ["raypp", "attack", str(bundle), *where]


workers_of_attacks = pytest.mark.parametrize(
    ("flags", "title"),
    [([], "ray::_call"), (["--cluster.num_workers", "2"], "RayTrainWorker")],
    ids=["a worker each", "two workers together"],
)


@workers_of_attacks
def test_attacks_outlive_killed_workers(
    cluster: Cluster, trained: Trained, tmp_path: Path, flags: list[str], title: str
) -> None:
    process = cluster.popen([*attack_command(trained, tmp_path, EPOCHS), *flags])
    inverse = tmp_path / "a" / "attacks" / "inverse"
    wait_until(lambda: len(history(inverse)) >= 2, process)
    for victim in cluster.head.processes(title)[-1 if flags else 0 :]:
        victim.kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    rows = history(inverse)
    assert [row["epoch"] for row in rows] == [n + 1 for n in range(EPOCHS)]
    assert {row["world"] for row in rows} == {2 if flags else 1}
    card = json.loads((tmp_path / "a" / "scorecard.json").read_text())
    assert [result["status"] for result in card["attacks"].values()] == ["done"] * 3
    assert "the inverse network's estimate" in card["attacks"]["white_box"]["note"]
    assert (tmp_path / "bundle" / "private" / "attacks" / "inverse.safetensors").exists()
    assert "T4" in out
    assert (tmp_path / "a" / "report.html").stat().st_size > 10_000


@workers_of_attacks
def test_stopped_attacks_write_a_checkpoint_first(
    cluster: Cluster, trained: Trained, tmp_path: Path, flags: list[str], title: str
) -> None:
    process = cluster.popen([*attack_command(trained, tmp_path, 10_000), *flags])
    inverse = tmp_path / "a" / "attacks" / "inverse"
    wait_until(lambda: len(history(inverse)) >= 2, process)
    signalled = time.time()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    assert "; continue with --resume" in " ".join(err.split())
    newest = inverse / "checkpoints" / list_checkpoints(Storage(inverse))[0]
    assert (newest / "checkpoint.json").stat().st_mtime > signalled - 1  # an epoch may have ended just before
    assert not (inverse / "result.json").exists()
    end = time.monotonic() + 60
    while cluster.head.processes(title):
        assert time.monotonic() < end, "workers outlive their driver"
        time.sleep(0.2)
